"""From result files to statistics, verdicts, figures and the report. Imports no torch."""
