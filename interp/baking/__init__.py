"""Edits baked into the weights of a checkpoint."""
