"""Circuits from discrete codes: autoencoders are trained on the outputs of all heads, and each head
has a code in each prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.methods.codes import edge_matrix
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Pairs
from interp.errors import InputError
from interp.results.circuit_table import EDGE_COLUMNS
from interp.support.extras import need

#: settings of the training
TRAINING = ("sparsity", "steps", "rate", "standardise", "variance")


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
class Codes:
    """The codes of one autoencoder: in positive and in negative examples (n, heads), −1 for none,
    and how many pairs of them are seen in positive ones alone (heads, heads)."""

    positive: np.ndarray
    negative: np.ndarray
    pairs: np.ndarray


@dataclass(frozen=True)
class CodedMethod(Method):
    """A method that scores heads by codes; what the score is, its subclass says.

    Args:
        features: size of the autoencoder. examples: how many random ones (positive or negative)
            train each autoencoder; trials: how many autoencoders. The score is the mean over
            trials.
        sparsity: λ. steps, rate: of full-batch Adam.
        pool: a head's output is its "mean" over positions, or that at the "last" judged position.
            vector: "result" (after W_O, d_model) or "z" (d_head).
        standardise: divide outputs by their root mean square, so that λ means the same in every
            model. variance: train in the principal subspace with this share of the variance
            (faster; 1 for the whole space).
        sae: an autoencoder of SAELens to be used instead, or its folder, or a list of them, layer
            by layer.
    """

    features: int = 200
    sparsity: float = 0.02
    steps: int = 500
    rate: float = 1e-3
    examples: int = 10
    trials: int = 10
    pool: str = "mean"
    vector: str = "result"
    standardise: bool = False
    variance: float = 1.0
    sae: Any = field(default=None, compare=False)

    edges_of = "pairs"
    #: whether the score needs to know what heads do for the metric (a backward pass)
    attributes: ClassVar[bool] = False

    def check(self) -> None:
        self.choice("pool", "mean", "last")
        self.choice("vector", "result", "z")
        self.at_least(1, "features", "steps", "examples", "trials")
        if not self.sparsity >= 0 or not self.rate > 0 or not 0 < self.variance <= 1:
            raise InputError(f"{self.name} takes sparsity ≥ 0, rate > 0 and variance in (0, 1].")
        need("sae_lens", extra="sae", what="Discrete-SAE circuits")

    def shuffles(self) -> tuple[str, ...]:
        return ("labels",) if self.attributes else ("sides",)

    @abstractmethod
    def score_of(self, codes: Codes, attributed: np.ndarray | None, seed: int) -> np.ndarray:
        """(heads,) from the codes and, where the method `attributes`, from what each head does for
        the metric in each example (n, heads)."""

    def found(
        self, scores: np.ndarray, attributed: np.ndarray | None, edges: pd.DataFrame, **more: Any
    ) -> Found:
        """What scores (trials, heads) say."""
        return Found(scores.mean(0), edges=edges, **more)

    def find(self, runs: PairedRuns) -> Found:
        from interp.circuits.methods import sae as autoencoders  # seconds: it imports sae_lens

        runs.expect(1 if self.sae is not None else self.trials + 1)
        outputs = gather(runs, self.pool, self.attributes)
        runs.step("outputs of heads")
        if self.sae is not None:
            return self._given(runs, outputs, autoencoders.loaded(self.sae))
        scores, edges = [], np.zeros((len(runs.heads),) * 2)
        best: tuple[float, Any] = (np.inf, None)
        for trial in range(self.trials):
            rng = np.random.default_rng([runs.seed, trial])
            seed = runs.seed * 1000 + trial
            autoencoder, _ = autoencoders.train(
                self._samples(outputs, rng), self.features, seed=seed,
                metadata=self._metadata(runs), **{name: getattr(self, name) for name in TRAINING},
            )  # fmt: skip
            codes = self._codes(runs, outputs, [autoencoder])
            edges += codes.pairs / self.trials
            scores.append(self.score_of(codes, outputs.attributed, seed))
            error = self._error(outputs, autoencoder)
            best = min(best, (error, autoencoder), key=lambda pair: pair[0])
            runs.step(f"autoencoder {trial + 1} of {self.trials}")
        artefacts = {"sae": autoencoders.Saved(best[1])} if best[1] is not None else {}
        table = _table(runs, edges)
        return self.found(np.array(scores), outputs.attributed, table, artefacts=artefacts)

    def _given(self, runs: PairedRuns, outputs: Outputs, given: Sequence[Any]) -> Found:
        codes = self._codes(runs, outputs, given)
        silent = np.flatnonzero((codes.positive < 0).all(0) & (codes.negative < 0).all(0))
        notes = []
        if len(silent):
            layers = sorted({runs.heads[h].layer for h in silent})
            notes.append(
                f"{self.name}: {len(silent)} heads (layers {', '.join(map(str, layers))}) have no "
                "code in the given autoencoders; their score is that of one code for all."
            )
        scores = self.score_of(codes, outputs.attributed, runs.seed)[None]
        table = _table(runs, codes.pairs)
        return self.found(scores, outputs.attributed, table, notes=notes)

    def _codes(self, runs: PairedRuns, outputs: Outputs, given: Sequence[Any]) -> Codes:
        from interp.circuits.methods.sae import codes_of

        sides = []
        for layers in (outputs.clean, outputs.corrupted):
            parts = []
            for layer, z, out in zip(runs.layers, layers, outputs.W_O, strict=True):
                tried = (codes_of(one, z, out, self.vector, layer) for one in given)
                code = next((c for c in tried if c is not None), None)
                parts.append(torch.full(z.shape[:2], -1) if code is None else code)
            sides.append(torch.cat(parts, 1).numpy())
        return Codes(sides[0], sides[1], edge_matrix(sides[0], sides[1]))

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
