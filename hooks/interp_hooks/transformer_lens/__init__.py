"""The tap on TransformerLens models, through their own hook points."""
