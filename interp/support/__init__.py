"""What every room uses and no model is needed for: registries, files, settings, progress,
provenance, statistics."""
