"""Every setting a user writes in YAML, as strict frozen sections, and how files become them. No torch."""
