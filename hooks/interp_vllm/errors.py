"""What can't be served, in one sentence."""

from __future__ import annotations

from interp_hooks.errors import InterpError


class ServingError(InterpError, ValueError):
    """An engine, or a request to it, whose heads can't be edited or read, with the reason."""
