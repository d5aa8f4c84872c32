"""Every architecture of transformers against its own eager attention: `python -m
interp_hooks.conformance`.

`configs` and `own` make a tiny valid config of each, `building` a model with peaky weights and its
inputs, `reference` what eager attention says, `checks` compares it with the tap's answers, `sweep`
runs one process a model and `table` writes docs/models.md.
"""
