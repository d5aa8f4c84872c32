"""Overwrite an attention row: a head looks where it is told to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import plain
from interp.edits.head_edit import HeadEdit
from interp.edits.keys import per_sample
from interp.errors import EditError
from interp_hooks.edit import Scope
from interp_hooks.heads import Head
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site


@dataclass(frozen=True)
class OverwriteRow(HeadEdit):
    """Overwrites one query's row of attention: A[q, ·] := Σ_i w_i e_{k_i}.

    One row q of each sample's prompt is put on chosen keys, so that z_q = Σ_i w_i v_{k_i} (Merullo
    et al. 2024, ICLR, section 5: the row of the last token). What other edits make of that row is
    overwritten too, unless they change z after this one.

    Args:
        heads: None for all.
        keys: positions k_i counted from each sample's first real token: a list for all samples, or
            a list for each sample (they may differ in length), or a (samples, m) tensor. One list
            of as many keys as the batch has samples is refused, because it reads like one key a
            sample: write [[k], …], or [[k, …]] for all.
        weights: w_i, finite, as many as keys: a list for all samples, or one for each; None for
            equal weights 1/m. They need not add up to 1.
        query: q, for all samples or one for each; None for each prompt's last token.
        scope: "prefill": decode steps see the model's own weights.

    Misleads:
        One row of the prompt is overwritten, decode steps are not. What it mends, random heads may
        mend too: the published experiment has that control, but its script is not in the released
        code.

    Raises:
        EditError: positions or weights that are none, lengths that don't agree; in use, a key after
            the query in a causal model, a query that the prompt does not have, a prompt that comes
            in several forwards, another number of samples.

    Example:
        >>> edit = interp.edits.OverwriteRow(["L2H0"], keys=[3, 4], weights=[1.0, 0.0])
        >>> ids = torch.arange(8)[None]
        >>> with model.edit(edit), model.activations("z", "v") as seen:
        ...     _ = model.logits(ids)
        >>> bool(torch.allclose(seen["z", 2][0, -1, 0], seen["v", 2][0, 3, 0], atol=1e-6))
        True
    """

    heads: tuple[Head, ...] | None
    keys: Any
    weights: Any = None
    query: Any = None
    scope: Scope = "prefill"

    name = "overwrite_row"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope != "prefill":
            raise EditError("overwrite_row changes a row of the prompt; its scope is prefill.")
        object.__setattr__(
            self,
            "keys",
            _rows(self.keys, _position, "The keys of overwrite_row are positions from 0"),
        )
        if not self.keys or not all(isinstance(k, int) or k for k in self.keys):
            raise EditError("overwrite_row needs at least one key for each sample.")
        if self.weights is not None:
            rows = _rows(self.weights, _finite, "The weights of overwrite_row are finite numbers")
            object.__setattr__(self, "weights", rows)
            keys, weights = map(_lengths, (self.keys, rows))
            if len(keys) > 1 and len(weights) > 1 and len(keys) != len(weights):
                raise EditError(
                    f"overwrite_row has keys for {len(keys)} samples and weights for "
                    f"{len(weights)}."
                )
            if keys != weights and len({*keys, *weights}) > 1:
                raise EditError("overwrite_row needs as many weights as keys, in each sample.")
        if self.query is not None:
            query = plain(self.query)
            if not (
                _position(query)
                or (isinstance(query, Sequence) and query and all(map(_position, query)))
            ):
                raise EditError(
                    "The query of overwrite_row is a position from 0, or one a sample, not "
                    f"{query!r}."
                )
            object.__setattr__(self, "query", query if isinstance(query, int) else list(query))

    def before(self, call: AttentionCall) -> AttentionCall:
        if call.pattern is None:  # the weights are never there; z is written instead
            return call
        row, columns, weights = self._where(call)
        line = torch.zeros(
            call.batch, call.n_keys, dtype=call.pattern.dtype, device=call.pattern.device
        )
        line.scatter_add_(1, columns, weights.to(line))
        heads = torch.tensor(self.heads_at(call.site), device=row.device)
        pattern, samples = call.pattern.clone(), torch.arange(call.batch, device=row.device)
        pattern[samples[:, None], heads, row[:, None]] = line[:, None]
        return replace(call, pattern=pattern)

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        row, columns, weights = self._where(call)
        samples = torch.arange(call.batch, device=z.device)
        values = call.value.transpose(1, 2)[samples[:, None], columns]  # (batch, m, kv_heads, d)
        exact = torch.promote_types(values.dtype, torch.float32)
        mixed = torch.einsum("bm,bmkd->bkd", weights.to(exact), values.to(exact))
        heads = torch.tensor(self.heads_at(call.site), device=z.device)
        group = call.site.n_heads // values.shape[2]
        new = z.clone()
        new[samples[:, None], row[:, None], heads] = mixed[:, heads // group].to(z.dtype)
        return new

    def _where(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The query's row (batch,), the keys' columns (batch, m) and their weights (batch, m) in
        this call."""
        mask, device = call.mask, call.value.device
        if mask.q_start > 0:
            raise EditError("overwrite_row needs the whole prompt in one forward.")
        starts = (
            torch.zeros(call.batch, dtype=torch.long, device=device)
            if mask.starts is None
            else mask.starts.long()
        )
        starts = starts.to(device)
        slots = torch.arange(call.n_queries, device=device).expand(call.batch, -1)
        real = (
            slots
            if mask.queries is None
            else torch.where(mask.queries.to(device).bool(), slots, -1)
        )
        last = real.amax(1)  # (batch,): the slot of the last real token
        row = (
            last
            if self.query is None
            else starts + per_sample(call, torch.tensor(self.query).reshape(-1), "queries")
        )
        if bool((row > last).any()):
            raise EditError(
                f"overwrite_row is told to overwrite the row of token {int((row - starts).max())}, "
                "and the shortest "
                f"prompt here has {int((last - starts).min()) + 1} tokens."
            )
        if isinstance(self.keys[0], int) and len(self.keys) == call.batch > 1:
            raise EditError(
                f"overwrite_row has one list of {call.batch} keys for {call.batch} samples; write "
                "[[k], …] for a key "
                "each, or the list in a list, [[k, …]], for all of them."
            )
        keys, weights = self._tensors()
        columns = starts[:, None] + per_sample(call, keys)
        if mask.causal and bool((columns > row[:, None]).any()):
            raise EditError(
                "overwrite_row has a key after its query, and this model is causal; name earlier "
                "tokens."
            )
        if bool((columns > last[:, None]).any()):
            raise EditError(
                "overwrite_row has a key that the prompt does not have; name tokens of the prompt."
            )
        return (
            row,
            columns - mask.k_start,
            per_sample(call, weights, "weights").expand(call.batch, -1),
        )

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and weights (samples or 1, m); shorter samples are filled up with weight 0 on token
        0."""
        keys = _listed(self.keys)
        weights = (
            [[1 / len(k)] * len(k) for k in keys] if self.weights is None else _listed(self.weights)
        )
        return _padded(keys, torch.long), _padded(weights, torch.float64)

    def route(self, site: Site) -> str:
        heads = ", ".join(map(str, self.heads_at(site)))
        return (
            f"overwrite_row of heads {heads}: z of that row made from the keys' values, after "
            "the kernel"
        )


def _position(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rows(given: Any, good: Any, what: str) -> list[Any]:
    """A list of numbers, or a list of such lists. Raises `EditError`."""
    values = plain(given)
    rows = isinstance(values, Sequence) and not isinstance(values, str)
    if rows and all(map(good, values)):
        return list(values)
    if rows and all(
        isinstance(r, Sequence) and not isinstance(r, str) and all(map(good, r)) for r in values
    ):
        return [list(r) for r in values]
    raise EditError(f"{what}, in a list for all samples or a list for each, not {quoted(values)}.")


def _listed(rows: list[Any]) -> list[list[Any]]:
    """A list for each sample; one for all is a list of one."""
    return rows if rows and isinstance(rows[0], list) else [rows]


def _lengths(rows: list[Any]) -> list[int]:
    return [len(row) for row in _listed(rows)]


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)
