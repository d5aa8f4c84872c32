"""A model at work on pairs of prompts: clean, corrupted and patched runs, gradients, edges."""
