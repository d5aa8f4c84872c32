"""Ablate heads: zero, mean, resample, or uniform, frozen or random attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.edits.checks import count
from interp.edits.fold import Affine
from interp.edits.head_edit import HeadEdit
from interp.edits.other_patterns import (
    Patterns,
    check,
    dealt,
    dealt_pattern,
    frozen,
    patterns_of,
)
from interp.edits.reference import reference_z
from interp.errors import EditError
from interp_hooks.edit import BoundEdit, CallEdit, Scope
from interp_hooks.whole_numbers import quoted
from interp_kernels import visible

if TYPE_CHECKING:
    from interp_hooks.call import AttentionCall, Site
    from interp_hooks.protocol import Model

MODES = ("zero", "mean", "resample", "uniform", "frozen", "random")
#: modes that replace where a head looks, and not what it gives
PATTERNS = ("uniform", "frozen", "random")


@dataclass(frozen=True)
class Ablate(HeadEdit):
    """Replaces the output of heads before W_O: z_h ← 0, a mean, a resample, or other attention.

    * zero: z = 0;
    * mean: z = mean of the head's z over a reference, pooled over its samples and positions;
    * resample: z of a random sample and position of the reference, seeded, the same for a token at
      prefill and at decode;
    * uniform: equal attention to every visible key (Wu et al. 2024, arXiv 2404.15574, "masking" a
      head);
    * frozen: the pattern of another text, at the same positions: z = softmax(q' k'ᵀ)·v, as a
      mixer that does not read;
    * random: each row's own weights dealt out anew among the keys it sees, seeded: the same
      entropy, and nothing of where.

    Args:
        heads: the heads, in any spelling; None for all.
        mode: "zero", "mean", "resample", "uniform", "frozen" or "random".
        reference: for mean and resample, a task name (its corrupted prompts are used) or a text
            file, as a `Path` or its name; for frozen the same, English as shipped if not given.
        seed: of the reference's samples, of the resampling and of the dealing.
        scope: "all", "prefill" or "decode".
        queries: (start, stop) tokens; None for all rows.

    Misleads:
        What stands in decides: zero is a value that the model may never see, a mean or a resample
        is nearer to what it knows. A frozen or random pattern still takes the first token's share
        to some other key, where its value may be large. That the task fails says that the head is
        needed, not what it does; that it does not fail may be another head's doing. Take out as
        many random heads of the same layers beside it.

    Raises:
        EditError: an unknown mode, or mean/resample without reference.

    Example:
        >>> edit = interp.edits.Ablate(["L2H3"])
        >>> with model.edit(edit), model.capture_z() as z:
        ...     _ = model.logits(torch.arange(8)[None])
        >>> bool((z[2][:, :, 3] == 0).all())
        True
    """

    heads: Any = None
    mode: str = "zero"
    reference: str | os.PathLike[str] | None = None
    seed: int = 0
    scope: Scope = "all"
    queries: tuple[int, int | None] | None = None

    name = "ablate"
    crosses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", count(self.seed, "The seed of ablate"))
        if isinstance(self.reference, os.PathLike):
            object.__setattr__(self, "reference", os.fspath(self.reference))
        if not isinstance(self.reference, str | None):
            raise EditError(
                "The reference of ablate is the name of a task or a text file, not "
                f"{quoted(self.reference)}."
            )
        if self.mode not in MODES:
            raise EditError(f"The ablation mode is one of {', '.join(MODES)}, not {self.mode!r}.")
        if self.mode in ("mean", "resample") and self.reference is None:
            raise EditError(
                f"Ablation mode {self.mode!r} needs reference=: a task name, or a text file."
            )

    def bind(self, model: Model) -> CallEdit:
        self.check_model(model)
        layers = {s.layer for s in model.sites if self.at(s)}
        if self.mode == "frozen":
            reference = None if self.reference is None else str(self.reference)
            return FrozenAblate(self, patterns_of(model, reference, layers, self.seed))
        if self.reference is None or self.mode not in ("mean", "resample"):
            return BoundEdit(self)
        return BoundAblate(self, reference_z(model, str(self.reference), layers, self.seed))

    def folded(self, model: Model) -> Mapping[Site, Affine]:
        if self.mode not in ("zero", "mean"):
            raise EditError(
                f"ablate by {self.mode} can't be baked into weights, since what stands in for a "
                "head depends on the prompt; zero and mean can."
            )
        self.check_unbounded()
        bound = self.bind(model)
        pools = bound.pools if isinstance(bound, BoundAblate) else {}
        found = {}
        for site in (s for s in model.sites if self.at(s)):
            gain, heads = torch.ones(site.n_heads, dtype=torch.float64), self.heads_at(site)
            gain[heads] = 0.0
            offset = None
            if site.layer in pools:
                mean = pools[site.layer].mean(0)  # as it is where the model runs
                offset = torch.zeros(mean.shape, dtype=torch.float64)
                offset[heads] = mean[heads].double()
            found[site] = Affine(gain, offset)
        return found

    def is_identity(self) -> bool:
        return self.heads == ()

    def before(self, call: AttentionCall) -> AttentionCall:
        if self.mode == "random" and call.pattern is not None:
            new = dealt_pattern(call, self.heads_at(call.site), self.seed)
            rows = self.query_rows(call)
            if rows is not None:
                assert new.pattern is not None
                kept = torch.where(rows[:, None, :, None], new.pattern, call.pattern)
                new = replace(new, pattern=kept)
            return new
        if self.mode != "uniform":
            return call
        heads, rows = self.heads_at(call.site), self.query_rows(call)
        if call.pattern is not None:
            mask = visible(call.mask, call.batch, call.n_queries, call.n_keys, call.pattern.device)
            flat = mask / mask.sum(-1, keepdim=True).clamp_min(
                1
            )  # (batch or 1, heads or 1, queries, keys)
            pattern = call.pattern.clone()
            pattern[:, heads] = flat.to(pattern.dtype).expand(call.batch, pattern.shape[1], -1, -1)[
                :, heads
            ]
            if rows is not None:
                pattern = torch.where(rows[:, None, :, None], pattern, call.pattern)
            return replace(call, pattern=pattern)
        if call.mask.dense is not None and call.mask.dense.dtype != torch.bool:
            raise EditError(
                "Uniform attention is not defined here: this model adds position biases to the "
                "scores."
            )
        assert call.query is not None
        # all scores equal: a zero query; with sink logits their share must go as well
        query = call.query.clone()
        query[:, heads] = 0
        sinks = call.sinks
        if rows is not None:
            if sinks is not None:
                raise EditError(
                    "Uniform attention in a range of queries is not possible here: "
                    "this model's sink "
                    "logits are the same for all queries."
                )
            query = torch.where(rows[:, None, :, None], query, call.query)
        if sinks is not None:
            sinks = sinks.clone()
            sinks[heads] = (
                torch.finfo(sinks.dtype).min / 2
            )  # not −inf, beside the −inf of a row that sees nothing
        return replace(call, query=query, sinks=sinks)

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if self.mode != "random" or call.pattern is not None:
            return z
        heads = self.heads_at(call.site)
        new = z.clone()
        new[:, :, heads] = dealt(call, heads, self.seed).to(z.dtype)
        return self.in_rows(call, new, z)

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        if self.mode in PATTERNS:
            return z
        new = z.clone()
        new[:, :, self.heads_at(call.site)] = 0
        return self.in_rows(call, new, z)

    def in_rows(self, call: AttentionCall, new: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`new` in the query rows edited, z in the others."""
        rows = self.query_rows(call)
        return new if rows is None else torch.where(rows[..., None, None], new, z)

    def route(self, site: Site) -> str:
        heads = ", ".join(map(str, self.heads_at(site)))
        how = {
            "uniform": "queries set to zero before the kernel",
            "frozen": "another text's queries and keys, after the model's own attention",
            "random": "weights dealt out anew, rows at a time, after the model's own attention",
        }.get(self.mode, "z replaced after the kernel")
        return f"ablate {self.mode} heads {heads}: {how}"


class BoundAblate(BoundEdit[Ablate]):
    """Mean or resample ablation in one model, with its reference outputs: `pools`, layer →
    (vectors, heads, d), from the model without any edit."""

    def __init__(self, edit: Ablate, pools: Mapping[int, torch.Tensor]):
        super().__init__(edit)
        self.pools = pools

    def apply(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        heads = self.edit.heads_at(call.site)
        pool, new = self.pools[call.site.layer].to(z), z.clone()
        if self.edit.mode == "mean":
            new[:, :, heads] = pool.mean(0)[heads]
        else:
            rows = torch.arange(z.shape[0], device=z.device)[:, None]
            slots = torch.arange(z.shape[1], device=z.device)[None] + call.mask.q_start
            # a fixed hash of (row, slot, seed), so that prefill and decode draw the same vector
            index = (slots * 7919 + rows * 104729 + self.edit.seed * 15485863) % len(pool)
            new[:, :, heads] = pool[index][:, :, heads]
        return self.edit.in_rows(call, new, z)


class FrozenAblate(BoundEdit[Ablate]):
    """Frozen ablation in one model, with the queries and keys of another text."""

    def __init__(self, edit: Ablate, patterns: Patterns):
        super().__init__(edit)
        self.patterns = patterns

    def attend(self, call: AttentionCall, z: torch.Tensor) -> torch.Tensor:
        check(call, "frozen")
        heads = self.edit.heads_at(call.site)
        new = z.clone()
        new[:, :, heads] = frozen(call, heads, self.patterns).to(z.dtype)
        return self.edit.in_rows(call, new, z)
