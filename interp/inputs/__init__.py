"""What goes into a model: rows of tokens, positions and padding, the context limit."""
