"""A model at work on pairs of prompts: clean and corrupted runs, gradients, and runs in which heads
are replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.circuits.runs.optimal import optimal
from interp.circuits.runs.prompts import Pairs, Prompts
from interp.errors import InputError
from interp.inputs.forward import forward
from interp.support.checkpoints import Checkpoints, Record
from interp_hooks.activations import Activations, Hook
from interp_hooks.heads import Head
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]
#: what takes the place of a head's z: nothing, its mean over the corrupted prompts (samples and
#: positions pooled), or its z in the corrupted twin at the same position
MODES = ("zero", "mean", "resample")
#: the same, and the constant by which the head is missed least (`optimal`)
ABLATIONS = (*MODES, "optimal")
#: tokens run together, without and with gradients
TOKENS, GRADIENT_TOKENS = 8192, 2048
#: bytes of what blocks gave that are held, at most
HELD = 2 << 30


class PairedRuns:
    """Runs prompts and counts: `forwards` and `backwards` are in passes over all prompts.

    `heads` are the query heads of the main tower in order; `index[head]` is a head's number among
    them.
    """

    def __init__(
        self,
        model: HookedModel,
        prompts: Prompts,
        seed: int = 0,
        progress: Progress | None = None,
        pieces: Checkpoints | None = None,
    ):
        #: what is finished of long searches, so that an interrupted one resumes
        self.pieces = pieces or Checkpoints(None, {})
        self.model, self.prompts, self.seed = model, prompts, seed
        self.sites = {s.layer: s for s in model.sites if s.is_main}
        if not self.sites:
            raise InputError(
                f"{model.name} has no self-attention in its main tower to find a circuit in."
            )
        self.heads = [
            Head(s.layer, h, s.tower) for s in self.sites.values() for h in range(s.n_heads)
        ]
        self.index = {head: i for i, head in enumerate(self.heads)}
        self.layers = list(self.sites)
        self._rows_forward = self._rows_backward = 0
        self._progress, self._done, self._total = progress, 0, 0
        self._means: dict[int, torch.Tensor] | None = None
        self._optimal: dict[int, torch.Tensor] | None = None

    @property
    def forwards(self) -> float:
        """Forward passes over all prompts so far."""
        return self._rows_forward / len(self.prompts)

    @property
    def backwards(self) -> float:
        """Backward passes over all prompts so far."""
        return self._rows_backward / len(self.prompts)

    def expect(self, steps: int) -> None:
        """Progress will be told in that many more steps."""
        self._total += steps

    def step(self, what: str, more: int = 1) -> None:
        """So many steps further."""
        self._done += more
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done), what)

    def batches(self, gradients: bool = False, copies: int = 1) -> list[Pairs]:
        """All prompts, in batches that fit, also `copies` times over."""
        return self.prompts.batches(
            self.model, (GRADIENT_TOKENS if gradients else TOKENS) // copies
        )

    @torch.no_grad()
    def run(
        self,
        pairs: Pairs,
        corrupted: bool = False,
        write: Hook | None = None,
        keep: Sequence[str] = (),
    ) -> tuple[torch.Tensor, Activations]:
        """(margins (batch,), activations kept) of one forward without gradients."""
        return self._forward(pairs, pairs.corrupted if corrupted else pairs.clean, write, keep)

    def gradients(
        self, pairs: Pairs, keep: Sequence[str]
    ) -> tuple[torch.Tensor, Activations, dict[tuple[str, int], torch.Tensor]]:
        """(margins (batch,), activations kept, ∂ Σ margins / ∂ each of them) of one forward and one
        backward, clean.

        Activations come with their graph cut off; a wire that the margin does not depend on has
        gradient 0.
        """
        margins, activations = self.live(pairs, keep)
        grads = torch.autograd.grad(
            margins, list(activations.values()), torch.ones_like(margins), allow_unused=True
        )
        gradients = {
            key: torch.zeros_like(wire) if g is None else g
            for (key, wire), g in zip(activations.items(), grads, strict=True)
        }
        return (
            margins.detach(),
            Activations({k: w.detach() for k, w in activations.items()}),
            gradients,
        )

    def live(
        self, pairs: Pairs, keep: Sequence[str], write: Hook | None = None
    ) -> tuple[torch.Tensor, Activations]:
        """(margins (batch,), activations kept) of one clean forward with its graph, for the
        backward counted with it."""
        self._rows_backward += len(pairs.rows)
        with torch.enable_grad():
            return self._forward(pairs, pairs.clean, _leaf(write), keep)

    def again(self, pairs: Pairs) -> None:
        """Count one more backward through the graph of a `live` run."""
        self._rows_backward += len(pairs.rows)

    def skipped(self, forwards: float) -> None:
        """Count passes over all prompts that an earlier search made."""
        self._rows_forward += round(forwards * len(self.prompts))

    def _forward(
        self, pairs: Pairs, ids: torch.Tensor, write: Hook | None, keep: Sequence[str]
    ) -> tuple[torch.Tensor, Activations]:
        logits, activations = self.logits(pairs, ids, write, keep)
        return pairs.margins(logits), activations

    def logits(
        self,
        pairs: Pairs,
        ids: torch.Tensor,
        write: Hook | None = None,
        keep: Sequence[str] = (),
        copies: int = 1,
    ) -> tuple[torch.Tensor, Activations]:
        """((copies · batch, last slots, vocabulary) from `pairs.first` or earlier, activations
        kept) of one forward of `ids`, `copies` times over."""
        self._rows_forward += copies * len(pairs.rows)
        with self.model.activations(*keep, write=write) as activations:
            mask = pairs.mask.repeat(copies, 1)
            out = forward(self.model, ids.repeat(copies, 1), mask, keep=ids.shape[1] - pairs.first)
        return logits_of(out), activations

    def margins(self, corrupted: bool = False) -> np.ndarray:
        """(n,) margins of the untouched model on the clean or the corrupted prompts."""
        return np.concatenate([_numbers(self.run(pairs, corrupted)[0]) for pairs in self.batches()])

    def corrupted(self) -> Iterator[tuple[Pairs, Activations]]:
        """(prompts, z of their corrupted twins) batch by batch; on the way `means` become known."""
        sums: dict[int, torch.Tensor] = {}
        count = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for pairs in self.batches():
            _, activations = self.run(pairs, corrupted=True, keep=("z",))
            count = count + pairs.mask.sum()
            for (_, layer), z in activations.items():  # (batch, tokens, heads, d)
                sums[layer] = sums.get(layer, 0) + z[pairs.mask.bool()].double().sum(0)  # type: ignore[operator]
            yield pairs, activations
        self._means = {layer: (total / count).float() for layer, total in sums.items()}

    def means(self) -> dict[int, torch.Tensor]:
        """layer → (heads, d_head): mean z over the corrupted prompts' tokens."""
        if self._means is None:
            for _ in self.corrupted():
                pass
        assert self._means is not None
        return self._means

    def stand_ins(self, pairs: Pairs, mode: str) -> Mapping[int, torch.Tensor | float]:
        """layer → what takes the place of z there: 0, (heads, d), (batch, tokens, heads, d), or
        (batch, 1, heads, d)."""
        if mode == "zero":
            return dict.fromkeys(self.layers, 0.0)
        if mode == "mean":
            return self.means()
        if mode == "resample":
            return {
                layer: z
                for (_, layer), z in self.run(pairs, corrupted=True, keep=("z",))[1].items()
            }
        if mode == "optimal":
            if self._optimal is None:
                self._optimal = optimal(self)
            which = torch.tensor(pairs.rows) % 2
            return {layer: made[which, None] for layer, made in self._optimal.items()}
        raise InputError(f"Heads are replaced by {', '.join(ABLATIONS)}, not {mode!r}.")

    def without(
        self,
        pairs: Pairs,
        heads: Sequence[Head],
        stand_ins: Mapping[int, torch.Tensor | float],
        blocks: Mapping[int, Any] | None = None,
    ) -> torch.Tensor:
        """(batch,) margins with the z of these heads replaced at every position. `blocks`: what
        each block gave in the clean run; those before the first of the heads do not run again."""
        write = replacing(heads, stand_ins)
        first = min((h.layer for h in heads), default=self.layers[0])
        before = self.layers[: self.layers.index(first)]
        if not blocks or not before:
            return self.run(pairs, write=write)[0]
        with self.model.resume(first, blocks[before[-1]]):
            return self.run(pairs, write=write)[0]

    def clean_blocks(self, batches: Sequence[Pairs]) -> list[dict[int, Any]]:
        """What each block gives on the clean prompts, batch by batch; nothing where that is too
        much to hold, or where a forward from there is not the model's own (a layer that reads more
        than the block before it)."""
        kept: list[dict[int, Any]] = []
        for pairs in batches:
            with self.model.block_outputs() as blocks:
                margins, _ = self.run(pairs)
            if not kept and not (
                _bytes(blocks) * len(batches) <= HELD and self._resumes(pairs, blocks, margins)
            ):
                return [{} for _ in batches]
            kept.append(dict(blocks))
        return kept

    def _resumes(self, pairs: Pairs, blocks: Mapping[int, Any], margins: torch.Tensor) -> bool:
        """Whether the last layer, run from what came before it, gives the model's own margins."""
        if set(blocks) != set(self.layers) or len(self.layers) < 2:
            return False
        try:
            with self.model.resume(self.layers[-1], blocks[self.layers[-2]]):
                again, _ = self.run(pairs)
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError):
            return False
        return torch.equal(again, margins)

    def ablation(self, mode: str, many: bool) -> Callable[[Sequence[Head]], list[Record]]:
        """Gives, for a set of heads, (n,) margins on the clean prompts with them replaced, as
        records; where `many` sets follow, what blocks gave in the clean run is kept."""
        batches = self.batches()
        stand_ins = [self.stand_ins(pairs, mode) for pairs in batches]
        blocks: list[dict[int, Any]] = [{} for _ in batches]
        if many:
            blocks = self.clean_blocks(batches)

        def run(heads: Sequence[Head]) -> list[Record]:
            margins = [
                _numbers(self.without(pairs, heads, s, b))
                for pairs, s, b in zip(batches, stand_ins, blocks, strict=True)
            ]
            return [
                Record("margin", i, "", mode, 0, 0, float(m))
                for i, m in enumerate(np.concatenate(margins))
            ]

        return run

    def many(self, sets: int) -> bool:
        """Whether so many sets of heads make it worth keeping the clean run."""
        return sets > len(self.layers)

    def ablated(
        self, sets: Sequence[Sequence[Head]], mode: str, what: str = ""
    ) -> Iterator[np.ndarray]:
        """(n,) margins on the clean prompts with each of these sets of heads replaced, in order;
        what `pieces` has is not run again."""
        run = self.ablation(mode, self.many(len(sets)))
        for heads in sets:
            key = set_key(mode, heads)
            if self.pieces.has(key):
                self._rows_forward += len(self.prompts)
            else:
                self.pieces.save(key, run(heads))
            yield self.pieces.records([key]).value.to_numpy(np.float64)
            self.step(what)


def set_key(mode: str, heads: Sequence[Head]) -> str:
    """The key of the piece in which these heads are replaced."""
    return hashlib.sha256(f"{mode} {sorted(heads)}".encode()).hexdigest()[:32]


def replacing(heads: Sequence[Head], stand_ins: Mapping[int, torch.Tensor | float]) -> Hook:
    """A rewrite of z that puts `stand_ins` in the place of these heads."""
    by_layer: dict[int, list[int]] = {}
    for head in heads:
        by_layer.setdefault(head.layer, []).append(head.head)

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place != "z" or layer not in by_layer:
            return None
        new, stand_in = tensor.clone(), stand_ins[layer]
        which = by_layer[layer]
        new[:, :, which] = (
            stand_in if isinstance(stand_in, float) else stand_in.to(tensor)[..., which, :]
        )
        return new

    return write


def _bytes(blocks: Mapping[int, Any]) -> int:
    """What the outputs of blocks, tensors or tuples of them, hold."""
    parts = [p for out in blocks.values() for p in (out if isinstance(out, tuple) else (out,))]
    return sum(p.numel() * p.element_size() for p in parts if isinstance(p, torch.Tensor))


def _leaf(write: Hook | None) -> Hook:
    """`write`, after making the stream a leaf where it has no graph, on entry of the first layer of
    a model whose parameters are frozen."""

    def both(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        leaf = place == "pre" and not tensor.requires_grad
        wire = tensor.detach().requires_grad_() if leaf else tensor
        new = None if write is None else write(place, layer, wire)
        return wire if leaf and new is None else new

    return both


def _numbers(margins: torch.Tensor) -> np.ndarray:
    return margins.detach().double().cpu().numpy()
