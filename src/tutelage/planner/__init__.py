"""Predict what a teacher is worth before anything runs: scaling laws, fits, costs, advice."""
