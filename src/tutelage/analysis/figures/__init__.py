"""Figures of studies, runs and token comparisons, as PNG, SVG and data."""
