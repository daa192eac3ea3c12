"""The comparisons, thin over gptfast.bench. `python -m benchmarks` runs ops and generation; see README.md."""
