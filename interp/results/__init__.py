"""Results as data: what is saved, loaded and compared. Nothing here runs a model."""
