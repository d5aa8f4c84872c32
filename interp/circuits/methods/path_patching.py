"""Path patching: what a head does for the metric along chosen paths alone, all other heads held as
they were."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.head_ablation import by_effects
from interp.errors import InputError, TapError
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    from interp.circuits.runs.paired_runs import PairedRuns
    from interp.circuits.runs.prompts import Pairs
    from interp_hooks.activations import Activations, Hook

#: the final residual stream, as a receiver
OUTPUT = "output"
POSITIONS = ("end", "all")
#: tokens run together: rows of several senders go into one forward
TOKENS = 4096
_INPUT = re.compile(r"(.+)\.([qkv])")


class Receiver(NamedTuple):
    """A head's query, key or value input; under grouped keys k and v of a head are those of all
    heads that share it."""

    head: Head
    wire: str

    def __str__(self) -> str:
        return f"{self.head}.{self.wire}"

    @staticmethod
    def parse(written: str) -> Receiver:
        """Read "L9H9.q" or "9.9.q". Raises `InputError` or `HeadError`."""
        match = _INPUT.fullmatch(written.strip())
        if match is None:
            raise InputError(
                'A receiver is "output" or a head with its input, like L9H9.q or 9.6.k, not '
                f"{written!r}."
            )
        return Receiver(Head.parse(match[1]), match[2])


@dataclass(frozen=True)
class PathPatching(Method):
    """effect(s) = (m(x) − m(x; s → R)) / |m(x) − m(x')|, means over the prompts; score = |effect|;
    x' is the corrupted twin.

    m(x; s → R) takes two runs on x. In the first, sender s's z is the corrupted run's, every other
    head's z is the clean run's at all positions, and MLPs recompute, or with `freeze_mlps` add what
    they added in the clean run; the receivers' inputs are recorded. In the second, all receivers
    together get these, at all positions, and the rest of the model answers. For the receiver
    "output", the final residual stream, the first run's answer is the metric.

    The published score is −100·(m_patched − m_clean)/(m_corrupted − m_clean), which is −100·effect
    where corrupting lowers the metric: here effect > 0 says that the path pushes towards the right
    answer, by that share of what corrupting costs.

    Args:
        receivers: ("output",), or inputs of heads, "L9H9.q" or "9.6.k", as a tuple or with commas
            between. k and v under grouped keys are those of a kv head, so every query head that
            shares it receives.
        positions: where the sender is patched: at the last judged position ("end"), or at "all".
            Patched at the end alone, a sender changes nothing earlier, so k and v of the receivers
            carry little; use "all" for them.
        freeze_mlps: hold the MLPs too; then only the direct path through the residual stream is
            left.
        senders: the heads to try; None for all. Those not in an earlier layer than some receiver
            have effect 0 and are not run.

    Intervals are bootstrapped over prompts, m(x) − m(x') taken as known. `edges` has a row for each
    sender and receiver; where several receivers are patched together, each row has their joint
    score.

    Misleads:
        By default the receiver is the final stream and the last position is patched: heads that act
        through other heads have nothing. Ask for their receivers by name.
    """

    receivers: tuple[str, ...] = (OUTPUT,)
    positions: str = "end"
    freeze_mlps: bool = False
    senders: tuple[Head, ...] | None = None

    name = "path_patching"
    title = "Path patching"
    summary = "replace each head along chosen paths, the other heads held: one or two passes a head"
    reading = (
        "How much of the metric this head accounts for along the paths to the receivers alone."
    )
    formula = "|m(x) − m(x; z_s := z_s(x') on the paths s → receivers)| / |m(x) − m(x')|"
    citation = (
        "Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969; "
        "Merullo et al. 2024"
    )
    unit = "share"
    edges_of = "paths"
    presets = {"direct": {"freeze_mlps": True}}

    def __post_init__(self) -> None:
        super().__post_init__()
        receivers = self.receivers.split(",") if isinstance(self.receivers, str) else self.receivers
        names = tuple(str(r).strip() for r in receivers)
        if not names or (OUTPUT in names and len(names) > 1):
            raise InputError(
                'The receivers of path_patching are "output" alone, or inputs of heads, like '
                "L9H9.q."
            )
        parsed = names if names == (OUTPUT,) else tuple(str(Receiver.parse(r)) for r in names)
        object.__setattr__(self, "receivers", tuple(dict.fromkeys(parsed)))
        if self.senders is not None:
            object.__setattr__(self, "senders", tuple(parse_heads(self.senders)))

    def check(self) -> None:
        self.choice("positions", *POSITIONS)
        if not isinstance(self.freeze_mlps, bool):
            raise InputError(
                f"freeze_mlps of {self.name} is true or false, not {self.freeze_mlps!r}."
            )

    @property
    def inputs(self) -> list[Receiver]:
        """The receiving inputs of heads; none where the receiver is the final residual stream."""
        return [] if self.receivers == (OUTPUT,) else [Receiver.parse(r) for r in self.receivers]

    def find(self, runs: PairedRuns) -> Found:
        for receiver in self.inputs:
            check_main(runs, receiver.head)
        senders = self.tried(runs)
        batches = runs.batches()
        runs.expect(len(senders) * len(batches))
        losses: list[np.ndarray] = []  # of each batch: (senders, batch)
        gaps: list[np.ndarray] = []
        for pairs in batches:
            paths = Paths(runs, pairs, self.positions, self.freeze_mlps)
            gaps.append((paths.clean - paths.corrupted).numpy())
            at_once = max(1, TOKENS // pairs.clean.numel())
            chunks = [np.zeros((0, len(pairs.rows)))]
            for start in range(0, len(senders), at_once):
                some = senders[start : start + at_once]
                chunks.append((paths.clean - paths.send([[s] for s in some], self.inputs)).numpy())
                runs.step(self.title, len(some))
            losses.append(np.concatenate(chunks))
        gap = float(np.concatenate(gaps).mean())
        if abs(gap) < 1e-9:
            raise InputError(
                f"Corrupting the prompts of {runs.prompts.name} does not change the metric, so "
                "there is no share "
                "of it to tell; choose another task, or corrupted prompts that call for another "
                "answer."
            )
        effects = np.zeros((len(runs.heads), len(runs.prompts)))
        effects[[runs.index[s] for s in senders]] = np.concatenate(losses, 1) / abs(gap)
        return self._found(runs, senders, effects, gap)

    def tried(self, runs: PairedRuns) -> list[Head]:
        """The senders that lie before some receiver."""
        last = max((r.head.layer for r in self.inputs), default=None)
        heads = runs.heads if self.senders is None else [check_main(runs, s) for s in self.senders]
        return [h for h in heads if last is None or h.layer < last]

    def _found(
        self, runs: PairedRuns, senders: Sequence[Head], effects: np.ndarray, gap: float
    ) -> Found:
        share = {s: float(abs(effects[runs.index[s]].mean())) for s in senders}
        rows = [
            (str(s), str(r.head), r.wire, share[s])
            for s in senders
            for r in self.inputs
            if s.layer < r.head.layer
        ]
        if not self.inputs:
            rows = [(str(s), OUTPUT, "", share[s]) for s in senders]
        notes = []
        if len(self.receivers) > 1:
            notes.append(
                f"Path patching: {', '.join(self.receivers)} are patched together; their edges "
                "share a score."
            )
        if gap < 0:
            notes.append(
                "Path patching: corrupting the prompts raises the metric; effects are shares of "
                "that rise."
            )
        if self.positions == "end" and any(r.wire != "q" for r in self.inputs):
            notes.append(
                "Path patching: senders are patched at the last position alone, where keys and "
                "values are seen by that "
                'position only; positions="all" patches them everywhere.'
            )
        edges = pd.DataFrame(rows, columns=["sender", "receiver", "kind", "score"])
        return by_effects(effects, edges=edges, notes=notes)


def check_main(runs: PairedRuns, head: Head) -> Head:
    """The head as the runs names it. Raises `HeadError`, or `InputError` for one outside the main
    tower."""
    runs.model.check(head)
    for site in runs.sites.values():
        if head.layer == site.layer and head.tower in ("", site.tower):
            return Head(head.layer, head.head, site.tower)
    raise InputError(
        f"{head} is not in the main tower of {runs.model.name}, which circuits are looked for in."
    )


class Paths:
    """A batch's clean and corrupted runs, kept, and runs in which some heads are the corrupted ones
    along some paths.

    clean, corrupted: (batch,) margins, float64 on the CPU.
    """

    def __init__(
        self, runs: PairedRuns, pairs: Pairs, positions: str = "end", freeze_mlps: bool = False
    ):
        self.runs, self.pairs, self.freeze_mlps = runs, pairs, freeze_mlps
        stream = ("pre", "mid", "post") if freeze_mlps else ()
        clean, self._kept = runs.run(pairs, keep=("z", *stream))
        corrupted, self._other = runs.run(pairs, corrupted=True, keep=("z",))
        self.clean, self.corrupted = clean.double().cpu(), corrupted.double().cpu()
        slots = torch.arange(pairs.clean.shape[1], device=pairs.clean.device)
        everywhere = torch.ones_like(pairs.mask, dtype=torch.bool)
        #: (batch, tokens): where senders are patched
        self.where = slots == pairs.ends()[:, None] if positions == "end" else everywhere
        parallel = (
            [layer for layer in runs.layers if ("mid", layer) not in self._kept]
            if freeze_mlps
            else []
        )
        self._outputs = _attention_outputs(runs, pairs, self._kept, parallel) if parallel else {}

    def send(
        self, sets: Sequence[Sequence[Head]], receivers: Sequence[Receiver] = ()
    ) -> torch.Tensor:
        """(sets, batch) margins, each with one set of heads patched along the paths to the
        receivers, or, without receivers, to the final residual stream. The rows of all sets run in
        one forward."""
        many = repeated(self.pairs, len(sets))
        keep = tuple({r.wire for r in receivers})
        margins, activations = self.runs.run(many, write=self._frozen(sets), keep=keep)
        if receivers:
            margins, _ = self.runs.run(many, write=self._received(receivers, activations))
        return margins.double().cpu().reshape(len(sets), -1)

    def _frozen(self, sets: Sequence[Sequence[Head]]) -> Hook:
        """Every z is the clean run's, but the senders' where they are patched; with `freeze_mlps`
        what an MLP adds is the clean run's too."""
        n, batch = len(sets), len(self.pairs.rows)
        now: dict[str, torch.Tensor] = {}

        def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            if place == "z":
                new = self._kept["z", layer].repeat(n, 1, 1, 1)  # (sets·batch, tokens, heads, d)
                for i, heads in enumerate(sets):
                    mine = [h.head for h in heads if h.layer == layer]
                    part = new[i * batch : (i + 1) * batch]
                    old, other = part[:, :, mine], self._other["z", layer][:, :, mine]
                    part[:, :, mine] = torch.where(self.where[..., None, None], other, old)
                now["z"] = new
                return new
            if not self.freeze_mlps or place not in ("pre", "mid", "post"):
                return None
            if place == "post":
                return self._post(layer, n, now)
            now[place] = tensor
            return None

        return write

    def _post(self, layer: int, n: int, now: dict[str, torch.Tensor]) -> torch.Tensor:
        """The stream after a layer whose MLP adds what it added in the clean run."""
        clean = self._kept
        if ("mid", layer) in clean:
            return now["mid"] + (clean["post", layer] - clean["mid", layer]).repeat(n, 1, 1)
        z, W_O = now["z"] - clean["z", layer].repeat(n, 1, 1, 1), self._outputs[layer]
        attention = torch.einsum("bqhd,hdm->bqm", z, W_O)
        return now["pre"] + attention + (clean["post", layer] - clean["pre", layer]).repeat(n, 1, 1)

    def _received(self, receivers: Sequence[Receiver], activations: Activations) -> Hook:
        """The receivers' inputs are those on `activations`."""

        def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
            heads = [r.head.head for r in receivers if r.wire == place and r.head.layer == layer]
            if not heads:
                return None
            group = (
                self.runs.sites[layer].n_heads // tensor.shape[2]
            )  # query heads that share a key
            mine, new = [h // group for h in heads], tensor.clone()
            new[:, :, mine] = activations[place, layer][:, :, mine]
            return new

        return write


def repeated(pairs: Pairs, times: int) -> Pairs:
    """The same prompts that many times over, for one forward."""
    return replace(
        pairs,
        clean=pairs.clean.repeat(times, 1),
        corrupted=pairs.corrupted.repeat(times, 1),
        mask=pairs.mask.repeat(times, 1),
        offset=pairs.offset * times,
        instances=pairs.instances * times,
        rows=range(times * len(pairs.rows)),
    )


def _attention_outputs(
    runs: PairedRuns, pairs: Pairs, kept: Activations, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """W_O (heads, d_head, d_model) of layers whose attention and MLP read the same stream, checked:
    without z these layers must add Σ z W_O less. Raises `TapError` where they do not."""
    by_layer = {
        layer: runs.model.head_weights(layer, runs.sites[layer].tower).W_O for layer in layers
    }

    def write(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if layer not in by_layer:
            return None
        return (
            torch.zeros_like(tensor)
            if place == "z"
            else kept["pre", layer]
            if place == "pre"
            else None
        )

    _, activations = runs.run(pairs, write=write, keep=("post",))
    for layer, W_O in by_layer.items():
        target = torch.einsum("bqhd,hdm->bqm", kept["z", layer], W_O.to(kept["z", layer]))
        less = kept["post", layer] - activations["post", layer]
        if not torch.allclose(less, target, rtol=1e-3, atol=1e-3 * float(target.abs().max())):
            raise TapError(
                f"Layer {layer} of {runs.model.name} does more to its attention than add it to "
                "the stream, so its MLP "
                "can't be frozen here; use freeze_mlps=False."
            )
    return by_layer
