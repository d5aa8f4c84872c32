"""Discrete-SAE circuits: give every head's output a code, and see which codes go with the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.codes import edge_matrix, edge_score, effect_score, node_score
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.errors import InputError
from interp.results.circuit_table import EDGE_COLUMNS
from interp.support.extras import need

SCORES = ("effect", "node", "edge")
#: training that a score gets where nothing else is said: the paper's for its own scores, a shorter
#: one for "effect", which hardly depends on it
PAPER: dict[str, Any] = dict(sparsity=0.02, steps=500, rate=1e-3, standardise=False, variance=1.0)
SHORT: dict[str, Any] = dict(sparsity=0.2, steps=200, rate=2.5e-3, standardise=True, variance=0.9)


@dataclass
class Outputs:
    """What the heads put out on both kinds of prompts: per layer z (n, heads, d_head), pooled over
    positions; W_O; and `attributed` (n, heads), (z − mean z) · ∂m/∂z summed over positions of the
    clean prompts, where asked for."""

    clean: list[torch.Tensor]
    corrupted: list[torch.Tensor]
    W_O: list[torch.Tensor]
    attributed: np.ndarray | None = None

    @property
    def n(self) -> int:
        return len(self.clean[0])


@dataclass(frozen=True)
class DiscreteSAE(Method):
    """O'Neill and Bui 2024, arXiv 2405.12522: one sparse autoencoder for the outputs of all heads,
    of which only the strongest feature is kept, a head's *code* in an example. Positive examples
    are the clean prompts, negative ones the corrupted.

    score:
        "node" (the paper's): how many different codes of a head are seen in positive and never in
        negative examples. "edge" (the paper's): the same of pairs of codes of two heads; a head
        counts by how often it is an end of the strongest pairs.
        "effect" (ours, the default): Σ_c n_c/n · |mean effect of the head in the examples with code
        c|, the effect to first order, (z − mean z) · ∂m/∂z, from one backward pass. The paper's
        scores see heads whose output tells positive from negative examples; this one sees what
        heads do, so that it also finds those that work alike in both, and passes over those that
        write what nobody reads.

    Args:
        features: size of the autoencoder. examples: how many random ones (positive or negative)
            train each autoencoder; trials: how many autoencoders. The score is the mean over
            trials; low and high are its 2.5 and 97.5 % quantiles over trials, for "effect" with
            prompts resampled too.
        sparsity: λ. steps, rate: of full-batch Adam. None for the paper's with the paper's scores
            (.02, 500, 1e-3), and shorter training for "effect" (.2 of standardised outputs, 200,
                2.5e-3).
        pool: a head's output is its "mean" over positions, or that at the "last" judged position.
            vector: "result" (after W_O, d_model) or "z" (d_head).
        standardise: divide outputs by their root mean square, so that λ means the same in every
            model. variance: train in the principal subspace with this share of the variance
            (faster; 1 for the whole space). None: both for "effect" (.9), neither for the paper's
                scores.
        sae: an autoencoder of SAELens to be used instead, or its folder, or a list of them, layer
            by layer.

    The autoencoder that reconstructs best is the artefact "sae", in SAELens's own format.

    Misleads:
        In the default score the codes are a placebo: shuffled over the prompts they give the same
        AUC and stability. It is an attribution grouped by codes; `preset="paper"` is the paper's
        method.
    """

    score: str = "effect"
    features: int = 200
    sparsity: float | None = None
    steps: int | None = None
    rate: float | None = None
    examples: int = 10
    trials: int = 10
    pool: str = "mean"
    vector: str = "result"
    standardise: bool | None = None
    variance: float | None = None
    sae: Any = field(default=None, compare=False)

    name = "discrete_sae"
    title = "Discrete SAE"
    summary = "codes of a small sparse autoencoder that go with the task; seconds"
    reading = "How much a head does in the situations that its codes tell apart."
    formula = (
        "effect: Σ_c n_c/n · |mean over examples with code c of (z − z̄)·∂m/∂z|; node: "
        "|codes(+) ∖ codes(−)|"
    )
    citation = "O'Neill and Bui 2024, arXiv 2405.12522"
    presets = {
        "paper": {"score": "node", **PAPER},
        "paper-edge": {"score": "edge", **PAPER},
        "paper-docstring": {"score": "node", **PAPER, "sparsity": 0.05},
    }

    def __post_init__(self) -> None:
        for name, value in (SHORT if self.score == "effect" else PAPER).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        self.choice("score", *SCORES)
        self.choice("pool", "mean", "last")
        self.choice("vector", "result", "z")
        self.at_least(1, "features", "steps", "examples", "trials")
        assert self.sparsity is not None and self.rate is not None and self.variance is not None
        if not self.sparsity >= 0 or not self.rate > 0 or not 0 < self.variance <= 1:
            raise InputError(f"{self.name} takes sparsity ≥ 0, rate > 0 and variance in (0, 1].")
        need("sae_lens", extra="sae", what="Discrete-SAE circuits")

    def caption(self) -> str:
        if self.score == "effect":
            return self.reading
        what = (
            "codes of this head"
            if self.score == "node"
            else "strong pairs of codes with this head in them"
        )
        return f"How many {what} are seen on clean prompts and never on corrupted ones."

    def find(self, runs: PairedRuns) -> Found:
        from interp.circuits.methods import sae as autoencoders  # seconds: it imports sae_lens

        runs.expect(1 if self.sae is not None else self.trials + 1)
        outputs = gather(runs, self.pool, self.score == "effect")
        runs.step("outputs of heads")
        if self.sae is not None:
            return self._given(runs, outputs, autoencoders.loaded(self.sae))
        scores, intervals, edges = [], [], np.zeros((len(runs.heads),) * 2)
        best: tuple[float, Any] = (np.inf, None)
        for trial in range(self.trials):
            rng = np.random.default_rng([runs.seed, trial])
            autoencoder, _ = autoencoders.train(
                self._samples(outputs, rng), self.features, seed=runs.seed * 1000 + trial,
                metadata=self._metadata(runs), **{name: getattr(self, name) for name in SHORT},
            )  # fmt: skip
            positive, negative = self._codes(runs, outputs, [autoencoder])
            pairs = edge_matrix(positive, negative)
            edges += pairs / self.trials
            scores.append(self._score(positive, negative, pairs, outputs.attributed))
            rows = rng.integers(0, outputs.n, outputs.n)
            again = self._score(
                positive[rows],
                negative,
                pairs,
                None if outputs.attributed is None else outputs.attributed[rows],
            )
            intervals.append(again if self.score == "effect" else scores[-1])
            error = self._error(outputs, autoencoder)
            best = min(best, (error, autoencoder), key=lambda pair: pair[0])
            runs.step(f"autoencoder {trial + 1} of {self.trials}")
        # a mean's magnitude is larger in resamples; the interval is centred on what was measured
        centred = np.array(intervals) - np.mean(intervals, axis=0) + np.mean(scores, axis=0)
        low, high = np.quantile(centred.clip(0), [0.025, 0.975], axis=0)
        stderr = np.std(intervals, axis=0, ddof=1) if self.trials > 1 else None
        mean = np.mean(scores, axis=0)
        effect = None if outputs.attributed is None else outputs.attributed.mean(0)
        return Found(
            mean, effect, stderr, low, high, None, _table(runs, edges),
            artefacts={"sae": autoencoders.Saved(best[1])} if best[1] is not None else {},
        )  # fmt: skip

    def _given(self, runs: PairedRuns, outputs: Outputs, given: Sequence[Any]) -> Found:
        positive, negative = self._codes(runs, outputs, given)
        pairs = edge_matrix(positive, negative)
        effect = None if outputs.attributed is None else outputs.attributed.mean(0)
        silent = np.flatnonzero((positive < 0).all(0) & (negative < 0).all(0))
        notes = []
        if len(silent):
            layers = sorted({runs.heads[h].layer for h in silent})
            notes.append(
                f"discrete_sae: {len(silent)} heads (layers {', '.join(map(str, layers))}) have no "
                "code in the given "
                "autoencoders; their score is that of one code for all."
            )
        score = self._score(positive, negative, pairs, outputs.attributed)
        return Found(score, effect, edges=_table(runs, pairs), notes=notes)

    def _score(
        self,
        positive: np.ndarray,
        negative: np.ndarray,
        pairs: np.ndarray,
        attributed: np.ndarray | None,
    ) -> np.ndarray:
        if self.score == "effect":
            assert attributed is not None
            return effect_score(positive, attributed)
        return node_score(positive, negative) if self.score == "node" else edge_score(pairs)

    def _codes(
        self, runs: PairedRuns, outputs: Outputs, given: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(codes in positive, in negative examples), each (n, heads); −1 for none."""
        from interp.circuits.methods.sae import codes_of

        sides = []
        for layers in (outputs.clean, outputs.corrupted):
            parts = []
            for layer, z, out in zip(runs.layers, layers, outputs.W_O, strict=True):
                tried = (codes_of(one, z, out, self.vector, layer) for one in given)
                code = next((c for c in tried if c is not None), None)
                parts.append(torch.full(z.shape[:2], -1) if code is None else code)
            sides.append(torch.cat(parts, 1).numpy())
        return sides[0], sides[1]

    def _samples(self, outputs: Outputs, rng: np.random.Generator) -> torch.Tensor:
        """(examples · heads, width): the outputs of all heads in randomly chosen examples."""
        indices = rng.choice(2 * outputs.n, min(self.examples, 2 * outputs.n), replace=False)
        return torch.cat([self._vectors(outputs, int(i)) for i in indices])

    def _vectors(self, outputs: Outputs, example: int) -> torch.Tensor:
        """(heads, width) of one example; positive ones come first."""
        side = outputs.clean if example < outputs.n else outputs.corrupted
        rows = [z[example % outputs.n] for z in side]
        if self.vector == "result":
            rows = [
                torch.einsum("hd,hdm->hm", z, out) for z, out in zip(rows, outputs.W_O, strict=True)
            ]
        return torch.cat(rows)

    @torch.no_grad()
    def _error(self, outputs: Outputs, made: Any, examples: int = 32) -> float:
        """Mean squared error on some examples."""
        indices = np.linspace(0, 2 * outputs.n - 1, min(examples, 2 * outputs.n)).astype(int)
        x = torch.cat([self._vectors(outputs, int(i)) for i in indices])
        return float((made.decode(made.encode(x)) - x).pow(2).mean())

    def _metadata(self, runs: PairedRuns) -> dict[str, Any]:
        """What the exported autoencoder says of itself."""
        return dict(
            model_name=runs.model.name,
            hook_name="attn.hook_result" if self.vector == "result" else "attn.hook_z",
            method="discrete SAE circuits (arXiv 2405.12522)",
            loss="mean squared error over samples and width + l1_coefficient * mean L1 norm",
            task=runs.prompts.name,
            pool=self.pool,
            layers=list(runs.layers),
            heads=[str(h) for h in runs.heads],
        )


@torch.no_grad()
def gather(runs: PairedRuns, pool: str, attribute: bool) -> Outputs:
    """Pooled outputs on clean and corrupted prompts; with `attribute`, also what each head does for
    the metric."""
    sides: list[list[list[torch.Tensor]]] = [[[] for _ in runs.layers] for _ in range(2)]
    for pairs, activations in runs.corrupted():
        _pool(runs, pairs, activations, pool, sides[1])
    attributed = []
    means = runs.means() if attribute else {}
    for pairs in runs.batches(gradients=attribute):
        if not attribute:
            _pool(runs, pairs, runs.run(pairs, keep=("z",))[1], pool, sides[0])
            continue
        _, activations, gradients = runs.gradients(pairs, ("z",))
        _pool(runs, pairs, activations, pool, sides[0])
        real = pairs.mask[..., None]
        per_layer = []
        for layer in runs.layers:
            z = activations["z", layer]  # (batch, tokens, heads, d)
            moved = ((z - means[layer].to(z)) * gradients["z", layer]).sum(-1) * real
            per_layer.append(moved.sum(1))  # (batch, heads)
        attributed.append(torch.cat(per_layer, 1).double().cpu().numpy())
    joined = [[torch.cat(parts) for parts in side] for side in sides]
    W_O = [
        runs.model.head_weights(layer, runs.sites[layer].tower).W_O.float().cpu()
        for layer in runs.layers
    ]
    return Outputs(joined[0], joined[1], W_O, np.concatenate(attributed) if attributed else None)


def _pool(
    runs: PairedRuns, pairs: Pairs, activations: Any, pool: str, into: list[list[torch.Tensor]]
) -> None:
    mask, rows = pairs.mask.to(torch.float32), torch.arange(len(pairs.rows))
    for parts, layer in zip(into, runs.layers, strict=True):
        z = activations["z", layer].float()  # (batch, tokens, heads, d)
        if pool == "mean":
            pooled = torch.einsum("bqhd,bq->bhd", z, mask) / mask.sum(1)[:, None, None]
        else:
            pooled = z[rows, pairs.ends()]
        parts.append(pooled.cpu())


def _table(runs: PairedRuns, counts: np.ndarray) -> pd.DataFrame:
    """Edges from the counts of pairs, strongest first; pairs within a layer are not edges."""
    depth = np.array([h.layer for h in runs.heads])
    i, j = np.nonzero((counts > 0) & (depth[:, None] < depth[None]))
    order = np.argsort(-counts[i, j], kind="stable")
    names = np.array([str(h) for h in runs.heads])
    rows = dict(
        sender=names[i][order], receiver=names[j][order], kind="", score=counts[i, j][order]
    )
    return pd.DataFrame(rows, columns=list(EDGE_COLUMNS))
