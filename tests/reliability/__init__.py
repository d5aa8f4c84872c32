"""What happens when things break, tried in numbers: commands whose counts docs/reliability.md
gives."""
