"""What the vision tower's class token looks at: outlier patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import PassScore
from interp.vision.patches import by_sample, patch_grid
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

if TYPE_CHECKING:
    from collections.abc import Iterator

#: DAMRO's for LLaVA; it takes 4 for InstructBLIP
TOP = 10


class CLSOutlier(PassScore):
    """Σ_{j∈O} A[CLS, j] / Σ_{j∈patches} A[CLS, j], O the k = 10 patches of the picture that the
    class token attends to most, on the mean over heads of the layer whose features the language
    model gets; the last layer of a model that reads pictures alone.

    A head that spreads evenly over n patches has 10/n. DAMRO finds O with one softmax over the full
    width instead of the mean over heads. Towers without a class token before a grid of patches
    (SigLIP, Qwen-VL) have no value. Shape (pictures, heads), then the mean over a sample's pictures
    or tiles.

    Misleads:
        Ten patches of a small grid are a large share: a head that spreads evenly over n patches has
        10/n. DAMRO, whose measure this is, did no better in smol-llava with these patches than with
        random ones.
    """

    name = "cls_outlier"
    title = "Class token on outliers"
    reading = (
        "Which share of its look at the patches the class token spends on the picture's ten "
        "outlier patches."
    )
    formula = "Σ_{j∈top 10} A[CLS, j] / Σ_{j∈patches} A[CLS, j]"
    citation = "Gong et al. 2024 (DAMRO, EMNLP), arXiv 2410.04514"
    probe = "image"
    default = True
    needs_images = True
    tower = "vision"
    undefined = "the vision tower has no class token before a grid of patches"

    def defined(self, batch: ProbeBatch) -> bool:
        grids = batch.info.get("grids")
        if grids is None:
            return True
        last = grids[feature_layer(batch.info["config"], len(grids))] if grids else None
        return last is not None and last.has_cls

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(
            received={"cls": Received(torch.tensor([[True]]))}
        )  # the row of slot 0 alone

    def measure_pass(self, layers: Sequence[LayerStats], batch: ProbeBatch) -> list[torch.Tensor]:
        return list(self._measure(layers, batch))

    def _measure(self, layers: Sequence[LayerStats], batch: ProbeBatch) -> Iterator[torch.Tensor]:
        config = batch.info["config"]
        last = layers[feature_layer(config, len(layers))].received[
            "cls"
        ]  # (pictures, heads, slots)
        grid = patch_grid(config, last.shape[-1], batch.info.get("pixels"))
        for layer in layers:
            row = layer.received["cls"]
            if grid is None or not grid.has_cls:
                yield row.new_full((batch.samples, row.shape[1]), torch.nan)
                continue
            outliers = (
                last[..., grid.first :].mean(1).topk(min(TOP, grid.patches)).indices
            )  # (pictures, k)
            patches = row[..., grid.first :]
            top = patches.gather(-1, outliers[:, None].expand(-1, row.shape[1], -1)).sum(-1)
            yield by_sample(top / patches.sum(-1), batch.samples)


def feature_layer(config: Any, n_layers: int) -> int:
    """The last layer of the vision tower that the language model's features have passed (−2 in
    `vision_feature_layer` is the output of the last but one)."""
    layer = getattr(config, "vision_feature_layer", -1)
    if isinstance(layer, list | tuple):  # features of several layers
        layer = layer[-1]
    index = n_layers + layer if layer < 0 else layer - 1  # hidden state 0 is the embedding
    return min(max(index, 0), n_layers - 1)
