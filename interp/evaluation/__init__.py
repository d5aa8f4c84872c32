"""How well a model does, with and without edits: accuracy, loss, pictures, other people's tasks."""
