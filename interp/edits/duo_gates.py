"""DuoAttention's gates, read from its file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from interp.errors import EditError, InputError
from interp.results.interchange.duo import Duo
from interp.results.interchange.entries import Entries
from interp.results.interchange.reading import read as read_scores
from interp.support.files import check_writable, write_atomic


class DuoGates(NamedTuple):
    """Gates (layers, kv_heads), and the first and recent tokens that its `config.json` names."""

    alpha: torch.Tensor
    sink: int | None
    recent: int | None


def read(path: str | os.PathLike[str]) -> DuoGates:
    """The gates of a file.

    Raises:
        OutputError: it can't be read.
        InputError: it holds something else, budgets of a cache or scores of query heads, say.
    """
    entries = read_scores(Path(path))
    if entries.format != "duo":
        raise InputError(
            f"{path} is a file of format {entries.format}, and gates are DuoAttention's table "
            "(full_attention_heads.tsv): a number between 0 and 1 for each key/value head."
        )
    layers, heads = entries.box
    table = [[entries.values[n, h] for h in range(heads)] for n in range(layers)]
    sink, recent = entries.said.get("sink_size"), entries.said.get("recent_size")
    return DuoGates(torch.tensor(table, dtype=torch.float32), sink, recent)


def write(folder: str | os.PathLike[str], alpha: torch.Tensor, sink: int, recent: int) -> Path:
    """`full_attention_heads.tsv` and `config.json` in a folder (made if need be), as DuoAttention
    keeps gates (layers, kv_heads). Raises `OutputError` where it can't be written."""
    values = {
        (layer, head): float(gate)
        for layer, row in enumerate(alpha.detach().tolist())
        for head, gate in enumerate(row)
    }
    table = Duo().write(Entries("duo", "gate", values, grain="kv_head", complete=True))
    target = Path(folder)
    check_writable(target)
    said = json.dumps(dict(sink_size=sink, recent_size=recent), indent=2) + "\n"
    for name, text in (("full_attention_heads.tsv", table), ("config.json", said)):
        write_atomic(target / name, text.encode())
    return target


def two_valued(
    alpha: torch.Tensor, sparsity: float | None, threshold: float | None
) -> torch.Tensor:
    """Gates of 0 and 1, as they are used; as they are where neither is given.

    Below the quantile `sparsity` (linear, as numpy's) of n distinct gates lie ⌈sparsity · (n − 1)⌉,
    none for 0 and all for 1: so many of the smallest become 0, of equal ones the first.

    Raises `EditError` for both, or one outside [0, 1].
    """
    if sparsity is None and threshold is None:
        return alpha
    if sparsity is not None and threshold is not None:
        raise EditError("Heads stream by sparsity or by threshold, not by both.")
    for name, value in (("sparsity", sparsity), ("threshold", threshold)):
        if value is not None and not 0 <= value <= 1:
            raise EditError(f"The {name} of gates is between 0 and 1, not {value}.")
    if threshold is not None:
        return (alpha >= threshold).to(alpha.dtype)
    n = alpha.numel()
    streaming = n if sparsity == 1 else math.ceil(round((sparsity or 0.0) * (n - 1), 9))
    order = alpha.flatten().argsort(stable=True)
    used = torch.ones(n, dtype=alpha.dtype)
    used[order[:streaming]] = 0.0
    return used.reshape(alpha.shape)
