"""The tap on HuggingFace models, through `transformers.AttentionInterface`."""
