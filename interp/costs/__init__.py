"""What a scan will cost, before a model is there: from its configuration and benchmarks."""
