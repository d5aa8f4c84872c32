"""Token ids of one's own as rows."""

from __future__ import annotations

from typing import Any

import torch

from interp.errors import InputError


def own_rows(inputs: Any) -> tuple[tuple[int, ...], ...] | None:
    """Token ids of one's own as rows; None for None. Raises `InputError` for what is none."""
    if inputs is None:
        return None
    rows = inputs.tolist() if isinstance(inputs, torch.Tensor) else list(inputs)
    if rows and isinstance(rows[0], int):
        rows = [rows]
    own = tuple(tuple(int(i) for i in row) for row in rows)
    if not own or any(len(row) < 2 for row in own):
        raise InputError(
            "Token ids of your own are (rows, tokens), or a list of rows, of at least two tokens "
            "each."
        )
    return own
