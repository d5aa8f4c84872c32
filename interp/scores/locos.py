"""LOCOS: what a head writes for the answer out of the needle, against what it writes elsewhere."""

from __future__ import annotations

import torch

from interp.probes.probe import ProbeBatch
from interp.scores.score import Score
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


class LOCOS(Score):
    """S = Σ_{j∈N} φ_j − (|N| / |off|) Σ_{j∉N} φ_j, φ_j = A[t, j] · u_y · (v_j W_O,h), averaged over
    the steps t of a given answer and over problems.

    N is the needle, y the answer's token at step t, u_y its column of W_U as stored (the final
    norm, its gain too, is left out, as in the released code), and off the other keys of the row. A
    head that writes the answer without looking at its literal copy counts; `retrieval` needs the
    copy. Both sums are key groups of z: Σ_N A v from the needle's own weights, and z less that, so
    no L × L pattern is made. Solved problems or not, all count; the released code keeps those whose
    generated answer is right.

    Misleads:
        It is the direct way from the head to the logit: what later layers make of the head's output
        does not count. The final norm is left out, so values of two models, or of prompts with
        streams of different length, are on different scales.
    """

    name = "locos"
    title = "LOCOS"
    reading = (
        "How much the head raises the right token's logit out of the needle, beyond as many other "
        "tokens; in units of the residual stream before the final norm."
    )
    formula = "Σ_{j∈N} φ_j − (|N|/|off|) Σ_{j∉N} φ_j,  φ_j = A[t, j] · u_y · (v_j W_O,h)"
    citation = "Logit-contribution scoring (LOCOS) 2026, arXiv 2607.01002"
    low = None
    high = None
    probe = "answer"
    undefined = "W_O and the unembedding can't both be read, or something stands between z and W_O"

    def ask(self, batch: ProbeBatch) -> Question:
        start, stop = batch.info["instance"].info["needle"]
        slots = {_pair(j): torch.tensor([[[j]]]) for j in range(start, stop)}
        return Question(pairs=slots, z=True, call=True)

    def measure(self, layer: LayerStats, batch: ProbeBatch) -> torch.Tensor:
        instance, toward = batch.info["instance"], batch.info["toward"]
        site, (start, stop) = layer.site, instance.info["needle"]
        if toward is None or getattr(site, "output_gate", False):
            return torch.full((1, site.n_heads), torch.nan)
        assert layer.z is not None and layer.call is not None
        rows = torch.tensor(instance.positions)
        weights = torch.stack(
            [layer.pair_mass[_pair(j)][0][:, rows] for j in range(start, stop)], -1
        )  # (heads, steps, needle)
        group = [site.kv_head(h) for h in range(site.n_heads)]
        v = layer.call.value[0, :, start - layer.k_start : stop - layer.k_start]
        inside = weights.float() @ v[group].float()  # (heads, steps, d_head)
        z = layer.z[0, rows].transpose(0, 1).float()  # (heads, steps, d_head)
        worth = toward(site).to(z)
        needle = (inside * worth).sum(-1)  # (heads, steps)
        rest = (z * worth).sum(-1) - needle
        size = stop - start
        off = (rows + 1 - size).to(rest)  # (steps,) other keys that a row may see
        return (needle - size / off * rest).mean(-1)[None]


def _pair(slot: int) -> str:
    return f"needle {slot}"
