"""Does attention agree with attribution? Rank correlation of where heads look with what the answer
rests on.

Jain & Wallace 2019 ("Attention is not Explanation", arXiv 1902.10186), Wiegreffe & Pinter 2019
(arXiv 1908.04626). Low agreement does not show that a head is useless: weights say where a head
looks, not what it takes from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.evaluation.accuracy import sample
from interp.inputs.forward import forward
from interp.inputs.text import check_seed
from interp.mechanics.attribution import Attribution, attributions
from interp.mechanics.metric import judged
from interp.mechanics.saliency import SALIENCIES, check
from interp.mechanics.weights import head_rows, main_sites
from interp.support.statistics import bootstrap, kendall, mean_and_error, spearman
from interp_kernels import Received

if TYPE_CHECKING:
    import pandas as pd

    from interp.tasks.task import Instance, Task
    from interp_hooks import HookedModel

#: of a method, as columns have it
SHORT = {"integrated": "ig"}
#: columns: the rank correlation and the attribution it is with
MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], str]] = {
    f"{letter}_{SHORT.get(name, name)}": (correlate, name)
    for letter, correlate in (("tau", kendall), ("rho", spearman))
    for name in SALIENCIES
}


def agreement(
    model: Any,
    task: str | Task = "ioi",
    n: int = 32,
    seed: int = 0,
    steps: int = 32,
    baseline: str = "mean",
    skip_first: bool = False,
) -> pd.DataFrame:
    """Rank correlation of each head's attention with token importance: Kendall's τ_b, Spearman's ρ.

    Importance of a token is |a_t|, a_t what it adds to answer logit − mean wrong logit at the first
    judged position of each of `n` problems, by gradient × input, integrated gradients, occlusion,
    DeepLIFT and LRP (`interp.mechanics.saliency`); attention is that position's row.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, or a task with settings of its own.
        n: problems.
        seed: of the problems.
        steps, baseline: of the integrated gradients, "mean" or "zero" embedding.
        skip_first: leave the first token out of the ranking, where attention sinks rest.

    Returns:
        A row a head with the columns an atlas begins with, then `tau_…` and `rho_…` of `gradient`,
        `ig`, `occlusion`, `deeplift` and `lrp`: means over problems, and `…_stderr`. A problem in
        which a head weighs all tokens alike is left out of its mean; NaN where that is so in all,
        and for a method that does not know a part of the model (a note says which). `attrs`:
        `layers`, the same measures of the mean attention over a layer's heads, each {"mean", "low",
        "high", "n"} with a 95 % bootstrap interval over problems; `completeness`, the median over
        problems of |Σa − Δm| / |Δm| of integrated gradients, and `completeness_worst`; `methods`,
        τ_b between the importances of each two methods, with its interval; `notes`.

    Raises:
        UnknownNameError, InputError, ContextError: the task or an option.
        TapError: the embedding is not known.

    Example:
        >>> frame = interp.mechanics.agreement(model, "ioi", n=2, steps=4)
        >>> len(frame), bool(frame["tau_ig"].abs().max() <= 1)
        (32, True)
    """
    from interp.loading import load

    check_seed(seed)
    check(steps, baseline)
    hooked = load(model)
    vocabulary = hooked.vocabulary()
    posed, instances = sample(hooked, task, n, seed)
    chosen = posed.task
    sites = main_sites(hooked)
    by_head: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    by_layer: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    gaps = []
    refused: dict[str, str] = {}
    between: list[np.ndarray] = []
    start = int(skip_first)
    for instance in instances:
        attribution = attributions(hooked, instance, steps, baseline, vocabulary)
        gaps.append(attribution.gap)
        refused |= attribution.refused or {}
        sizes = {name: _size(attribution, name, start) for name in SALIENCIES}
        between.append(_between(sizes))
        rows = attention_rows(hooked, instance)  # layer → (heads, tokens)
        for name, (correlate, which) in MEASURES.items():
            target = sizes[which]
            layers = [rows[s.layer][:, start:] for s in sites]
            by_head[name].append(np.array([correlate(row, target) for a in layers for row in a]))
            by_layer[name].append(np.array([correlate(a.mean(0), target) for a in layers]))
    frame = head_rows(hooked)
    for name, values in by_head.items():
        table = np.array(values)  # (problems, heads)
        frame[name], frame[f"{name}_stderr"] = mean_and_error(table)
    frame.attrs.update(
        task=chosen.name,
        n=n,
        seed=seed,
        steps=steps,
        baseline=baseline,
        layers=_layers([s.layer for s in sites], by_layer, seed),
        completeness=float(np.median(gaps)),
        completeness_worst=float(np.max(gaps)),
        methods=_methods(np.array(between), seed),
        notes=[*_notes(gaps, steps), *refused.values()],
    )
    return frame


@torch.no_grad()
def attention_rows(model: HookedModel, instance: Instance) -> dict[int, np.ndarray]:
    """layer → (heads, tokens): attention of the first judged position of a problem, over the prompt
    up to it."""
    batch = judged(model, [instance], first_only=True)
    queries = torch.zeros(batch.input_ids.shape, dtype=torch.bool, device=model.device)
    queries[0, -1] = True
    with model.observe(received={"row": Received(queries=queries)}) as recording:
        forward(model, batch.input_ids)
    return {
        s.layer: recording[_key(s)].received_by("row")[0].double().cpu().numpy()
        for s in main_sites(model)
    }


def _key(site: Any) -> Any:
    return site.layer if site.is_main else (site.tower, site.layer)


def _size(found: Attribution, method: str, start: int) -> np.ndarray:
    """(tokens,) |a_t|; NaN for a method that was refused."""
    values = getattr(found, method)
    if values is None:
        return np.full(len(found.gradient) - start, np.nan)
    return np.abs(values[start:])


def _between(sizes: dict[str, np.ndarray]) -> np.ndarray:
    """(methods, methods) τ_b."""
    return np.array([[kendall(a, b) for b in sizes.values()] for a in sizes.values()])


def _methods(values: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    """Method → method → the mean of (problems, methods, methods) and its interval, None where not
    defined."""
    found: dict[str, dict[str, Any]] = {}
    for i, a in enumerate(SALIENCIES):
        for j, b in enumerate(SALIENCIES):
            defined = values[:, i, j][np.isfinite(values[:, i, j])]
            interval = bootstrap(defined, seed) if len(defined) else None
            found.setdefault(a, {})[b] = None if interval is None else dict(vars(interval))
    return found


def _layers(
    layers: list[int], values: dict[str, list[np.ndarray]], seed: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, layer in enumerate(layers):
        row: dict[str, Any] = dict(layer=layer)
        for name, arrays in values.items():
            defined = [float(v[i]) for v in arrays if np.isfinite(v[i])]
            interval = bootstrap(defined, seed) if defined else None
            row[name] = None if interval is None else dict(vars(interval))
        rows.append(row)
    return rows


def _notes(gaps: list[float], steps: int) -> list[str]:
    middle = float(np.median(gaps))
    if middle <= 0.01:
        return []
    return [
        f"integrated gradients miss m(e) − m(b) by {middle:.1%} (median) with {steps} steps: take "
        "more, or the metric "
        "jumps on the way (at the zero baseline under norms, between experts)."
    ]
