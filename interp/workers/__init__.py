"""One run in many processes: what can be done in any order is shared out, and merged in order."""
