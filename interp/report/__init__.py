"""Pictures of results: heat maps and the self-contained HTML page."""
