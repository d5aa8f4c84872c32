"""Every score of every head in the fewest forward passes."""
