"""How far heads of the vision tower look."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp.vision.patches import by_sample, mean_distance, patch_grid
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class ViTDistance(Score):
    """mean_i Σ_j A_ij ‖p_i − p_j‖ / Σ_j A_ij over patches i, j at grid places p: Euclidean, in
    patches; the class token and registers are left out. Towers whose patches are no grid of known
    size have no value.

    Shape (pictures, heads), then the mean over a sample's pictures or tiles.

    Misleads:
        It is counted in patches, so larger grids give larger values, and patches at the edge see
        farther than those in the middle.
    """

    name = "vit_distance"
    title = "Distance in the picture"
    reading = (
        "How far from itself a patch looks on average, in patches: small in local heads, "
        "large in global ones."
    )
    formula = "mean over patches i of Σ_j A_ij ‖p_i − p_j‖ / Σ_j A_ij"
    citation = "Dosovitskiy et al. 2021, arXiv 2010.11929 (mean attention distance)"
    unit = "patches"
    high = None
    probe = "image"
    default = True
    needs_images = True
    tower = "vision"
    undefined = "the vision tower's patches are no grid of known size"

    def defined(self, batch: ProbeBatch) -> bool:
        return any(batch.info.get("grids", (True,)))

    def ask(self, batch: ProbeBatch) -> Question:
        return Question(call=True)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        assert layer.call is not None and layer.call.query is not None
        grid = patch_grid(batch.info["config"], layer.call.n_keys, batch.info.get("pixels"))
        if grid is None or layer.call.n_queries != layer.call.n_keys:
            return layer.call.query.new_full((batch.samples, layer.site.n_heads), torch.nan)
        return by_sample(mean_distance(layer.call, grid), batch.samples)
