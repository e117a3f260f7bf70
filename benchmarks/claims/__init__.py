"""The paper's claims as experiments: ``python -m benchmarks.claims``."""
