"""Programs that print the tables of the README: ``python -m benchmarks.NAME``."""
