"""One script a claim: `python -m benchmarks.NAME [--quick] [--json FILE]`. Each prints what it measured in that run."""
