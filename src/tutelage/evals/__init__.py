"""Evaluate models: scores with standard errors."""
