"""Per-head weights from an attention module, whatever its projections are called. GQA mapped to
query heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.call import Site
from interp_hooks.errors import TapError

OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")


@dataclass(frozen=True)
class HeadWeights:
    """One layer's weights by query head.

    W_Q, W_K, W_V: (heads, d_model, d_head); b_Q, b_K, b_V: (heads, d_head) or None; W_O: (heads,
    d_head, d_model); b_O: (d_model,) or None. The layer's output is Σ_h z_h W_O[h] + b_O. Query/key
    norms are not folded in.
    """

    W_Q: torch.Tensor
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor
    b_Q: torch.Tensor | None = None
    b_K: torch.Tensor | None = None
    b_V: torch.Tensor | None = None
    b_O: torch.Tensor | None = None

    def result(self, z: torch.Tensor) -> torch.Tensor:
        """(batch, queries, heads, d_model): each head's contribution z_h W_O[h] to the residual
        stream."""
        return torch.einsum("bqhd,hdm->bqhm", z, self.W_O.to(z))


def _matrix(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, in) weight and bias of a Linear or a GPT-2 Conv1D (which stores it transposed)."""
    weight: Any = linear.weight
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight.detach(), None if linear.bias is None else linear.bias.detach()


def output_projection(module: torch.nn.Module) -> torch.nn.Module | None:
    """The module that maps concatenated heads to the residual stream."""
    for name in OUTPUT:
        found = getattr(module, name, None)
        if isinstance(found, torch.nn.Module) and hasattr(found, "weight"):
            return found
    return None


def head_output(module: torch.nn.Module, site: Site) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_O (heads, d_v, d_model) and b_O. Raises `TapError` if there is no output projection of the
    right shape."""
    projection = output_projection(module)
    if projection is None:
        raise TapError(
            f"{type(module).__name__} (layer {site.layer}) has no output projection this toolkit "
            "knows."
        )
    weight, bias = _matrix(projection)
    if weight.shape[1] % site.n_heads:
        raise TapError(
            f"The output projection of layer {site.layer} does not split into {site.n_heads} heads."
        )
    return weight.T.reshape(site.n_heads, -1, weight.shape[0]), bias


def _split(module: torch.nn.Module, site: Site) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """[(weight (out, in), bias)] of q, k, v. Raises `TapError` for projections not known here."""
    if all(hasattr(module, f"{n}_proj") for n in "qkv"):
        return [_matrix(getattr(module, f"{n}_proj")) for n in "qkv"]
    q, kv = site.n_heads * site.d_head, site.n_kv_heads * site.d_head
    for name in ("c_attn", "qkv_proj", "Wqkv"):
        if hasattr(module, name):
            weight, bias = _matrix(getattr(module, name))
            parts = weight.split([q, kv, weight.shape[0] - q - kv])
            biases = [None] * 3 if bias is None else bias.split([q, kv, bias.shape[0] - q - kv])
            return list(zip(parts, biases, strict=True))
    if hasattr(module, "query_key_value"):  # GPT-NeoX: q, k, v interleaved head by head
        weight, bias = _matrix(module.query_key_value)
        rows = weight.reshape(site.n_heads, 3, site.d_head, -1)
        pieces = [rows[:, i].reshape(q, -1) for i in range(3)]
        biases = (
            [None] * 3
            if bias is None
            else [b.reshape(-1) for b in bias.reshape(site.n_heads, 3, -1).unbind(1)]
        )
        return list(zip(pieces, biases, strict=True))
    raise TapError(
        f"The query, key and value projections of {type(module).__name__} are not known to this "
        "toolkit."
    )


def head_weights(module: torch.nn.Module, site: Site) -> HeadWeights:
    """`HeadWeights` of an attention module."""
    by_head: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for (weight, bias), n in zip(
        _split(module, site), (site.n_heads, site.n_kv_heads, site.n_kv_heads), strict=True
    ):
        heads = weight.reshape(n, -1, weight.shape[-1]).transpose(1, 2)  # (n, d_model, d_head)
        offset = None if bias is None else bias.reshape(n, -1)
        repeat = site.n_heads // n
        by_head.append(
            (
                heads.repeat_interleave(repeat, 0),
                None if offset is None else offset.repeat_interleave(repeat, 0),
            )
        )
    (wq, bq), (wk, bk), (wv, bv) = by_head
    wo, bo = head_output(module, site)
    return HeadWeights(wq, wk, wv, wo, bq, bk, bv, bo)
