"""Studies: grids of runs, planned, run and gathered."""
