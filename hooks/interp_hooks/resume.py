"""Forwards that begin in the middle of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def skipping(blocks: Mapping[int, torch.nn.Module], before: int, output: Any) -> Iterator[None]:
    """The blocks before layer `before` don't run; each returns `output` at once, what the last of
    them gave."""
    left_out = [block for layer, block in blocks.items() if layer < before]
    own = [block.__dict__.get("forward") for block in left_out]
    try:
        for block in left_out:
            block.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(left_out, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
