"""Pictures asked about, with and without interventions: answers, counts, and ratios with bootstrap
intervals.

A way of answering (`Method`) is anything that makes tokens from a prompt with an image: edits,
procedures, or both. Ratios of sums are resampled by picture, since questions about one picture are
not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.results.evaluation import Comparison, Evaluation, edits_as_json
from interp.support.provenance import provenance
from interp.support.statistics import RESAMPLES, Interval, mcnemar
from interp.tasks.images import ImageTask, Picture
from interp.vision.prompts import needs_images, with_images
from interp_hooks.edit import Edit

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.model import HookedModel

#: model, inputs, the most new tokens → (batch, prompt and new tokens)
Method = Callable[["HookedModel", dict[str, torch.Tensor], int], torch.Tensor]
#: prompts run together
BATCH = 32


def plain(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
    """Greedy generation."""
    return model.generate(**inputs, max_new_tokens=new, do_sample=False)


def under(*edits: Edit) -> Method:
    """Greedy generation under edits."""

    def run(model: HookedModel, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
        with model.edit(*edits):
            return plain(model, inputs, new)

    return run


@torch.no_grad()
def answers(
    model: HookedModel,
    problems: Sequence[Picture],
    method: Method,
    new: int,
    progress: Callable[[int], None] | None = None,
    batch: int = BATCH,
) -> list[str]:
    """What the model says to each problem."""
    said: list[str] = []
    for a in range(0, len(problems), batch):
        some = problems[a : a + batch]
        inputs = with_images(model, [p.prompt for p in some], [[p.image] for p in some])
        ids = method(model, inputs, new)
        said += model.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        if progress:
            progress(len(said))
    return said


def counted(task: ImageTask, problems: Sequence[Picture], said: Sequence[str]) -> pd.DataFrame:
    """A row a problem: the picture it is about, the answer, and what is counted of it."""
    import pandas as pd

    rows = [
        dict(group=p.group, answer=a, **task.count(a, p))
        for p, a in zip(problems, said, strict=True)
    ]
    return pd.DataFrame(rows)


def ratios(
    task: ImageTask, frame: pd.DataFrame, draws: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """metric → Σ above / Σ below: one number, or one of each draw (draws, groups) of how often each
    picture counts. Where the lower sum is 0 (no yes was said, say) the ratio counts as 0."""
    sums = frame.drop(columns=["answer"]).groupby("group").sum()
    by_metric = {}
    for name, (above, below) in task.metrics.items():
        top, bottom = (
            sums[list(dict.fromkeys(c))]
            .mul([c.count(k) for k in dict.fromkeys(c)])
            .sum(axis=1)
            .to_numpy()
            for c in (above, below)
        )
        weights = np.ones((1, len(sums))) if draws is None else draws
        upper, lower = weights @ top, weights @ bottom
        by_metric[name] = np.divide(upper, lower, out=np.zeros_like(upper), where=lower > 0)
    return by_metric


def compare(
    task: ImageTask, frames: Mapping[str, pd.DataFrame], seed: int = 0
) -> dict[str, dict[str, Comparison]]:
    """method → metric → baseline (the first frame), edited, paired difference, by the same draws of
    pictures."""
    first = next(iter(frames.values()))
    groups = first.group.nunique()
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [np.bincount(d, minlength=groups) for d in rng.integers(0, groups, (RESAMPLES, groups))]
    )
    at = {name: ratios(task, frame) for name, frame in frames.items()}
    resamples = {name: ratios(task, frame, draws) for name, frame in frames.items()}
    base = next(iter(frames))

    def interval(values: np.ndarray, mean: float) -> Interval:
        low, high = np.quantile(values, [0.025, 0.975])
        return Interval(mean, float(low), float(high), groups)

    comparisons: dict[str, dict[str, Comparison]] = {}
    for name in frames:
        comparisons[name] = {}
        for metric in task.metrics:
            here, there = float(at[base][metric][0]), float(at[name][metric][0])
            edited = interval(resamples[name][metric], there)
            change = interval(resamples[name][metric] - resamples[base][metric], there - here)
            plain_one = interval(resamples[base][metric], here)
            comparisons[name][metric] = Comparison(plain_one, None if name == base else edited,
                                             None if name == base else change)  # fmt: skip
    return comparisons


def evaluate_images(
    model: HookedModel,
    task: ImageTask,
    edits: Sequence[Edit],
    n: int,
    seed: int,
    progress: Callable[[int, int, str], None] | None = None,
    method: Method | None = None,
) -> Evaluation:
    """`n` problems, untouched and (with edits, or another `method`) edited: the task's metrics,
    paired by picture.

    Raises `InputError` for a text-only model, or n < 1.
    """
    import pandas as pd

    needs_images(model, f"The task {task.name}")
    if n < 1:
        raise InputError("An evaluation needs at least one instance; use n ≥ 1.")
    problems = task.problems(n, seed)
    ways: dict[str, Method] = {"baseline": plain}
    if edits or method is not None:
        ways["edited"] = method or under(*edits)
    report = progress or (lambda done, total, what: None)
    frames = {}
    for k, (name, way) in enumerate(ways.items()):
        done, what = k * len(problems), "untouched" if name == "baseline" else name

        def step(m: int, done: int = done, what: str = what) -> None:
            report(done + m, len(ways) * len(problems), what)

        said = answers(model, problems, way, task.max_new_tokens, step)
        frames[name] = counted(task, problems, said)
    comparisons = compare(task, frames, seed)[list(ways)[-1]]
    headline = next(iter(task.metrics))
    rows = frames["baseline"].add_prefix("baseline_").rename(columns={"baseline_group": "group"})
    if "edited" in frames:
        rows = pd.concat(
            [rows, frames["edited"].drop(columns=["group"]).add_prefix("edited_")], axis=1
        )
    test = None
    if "edited" in frames and "right" in frames["edited"]:
        test = mcnemar(frames["baseline"].right.tolist(), frames["edited"].right.tolist())
    settings: dict[str, Any] = dict(
        task=task.name,
        metric=headline,
        n=len(problems),
        edits=edits_as_json(edits),
        backend=model.backend,
        task_settings={k: v for k, v in vars(task).items() if isinstance(v, (str, int))},
    )
    texts = [torch.tensor(list(p.prompt.encode())) for p in problems]
    first = comparisons[headline]
    return Evaluation(
        task.name,
        headline,
        first.baseline,
        first.edited,
        first.difference,
        rows,
        test,
        provenance(model, seed, settings, [*texts, problems], [task, *edits]),
        (),
        {k: v for k, v in comparisons.items() if k != headline},
    )
