"""Programs that measure the figures of docs/benchmarks.md: ``python -m benchmarks.NAME``."""
