"""The report of a study: one page, a terminal text and CSV tables of the same rows."""
