"""Evaluate a model on a task, with and without edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.errors import InputError
from interp.inputs import check_context, forward, pad_id
from interp.statistics import Interval, bootstrap
from interp.tasks.base import Batch, Instance, Task, collate

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]
#: tokens run together
BUDGET = 8192


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a task as `Interval`s; `edited` and `difference` (paired) are None without edits.

    `frame`: one row an instance with `baseline`, `baseline_margin` (and `edited`, `edited_margin`).
    """

    task: str
    metric: str
    baseline: Interval
    edited: Interval | None
    difference: Interval | None
    frame: pd.DataFrame


def batches(instances: Sequence[Instance], pad: int) -> Iterator[Batch]:
    """Left-padded batches of similar lengths within the token budget, in order of the instances."""
    group: list[Instance] = []
    for instance in instances:
        width = max(len(i.ids) for i in [*group, instance])
        if group and (width * (len(group) + 1) > BUDGET or len(instance.ids) > 2 * len(group[0].ids)):
            yield collate(group, pad)
            group = []
        group.append(instance)
    if group:
        yield collate(group, pad)


@torch.no_grad()
def answer_logits(model: HookedModel, batch: Batch, stepwise: bool = False) -> list[torch.Tensor]:
    """(judged positions, vocabulary) float32 of each instance.

    `stepwise`: prefill each prompt and feed the answer token by token through the cache, so that edits with a
    prefill or decode scope act as they do in generation.
    """
    if stepwise and model.has_cache:
        return [_by_steps(model, instance) for instance in batch.instances]
    width = batch.input_ids.shape[1]
    first = min(p + o for i, o in zip(batch.instances, batch.offset, strict=True) for p in i.positions)
    out = forward(model, batch.input_ids, batch.attention_mask, keep=width - first)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    start = width - logits.shape[1]  # models without logits_to_keep return all rows
    return [
        logits[b, [p + offset - start for p in i.positions]].float().cpu()
        for b, (i, offset) in enumerate(zip(batch.instances, batch.offset, strict=True))
    ]


def _by_steps(model: HookedModel, instance: Instance) -> torch.Tensor:
    prompt = torch.tensor([instance.prompt])
    out = forward(model, prompt, use_cache=True, keep=1)
    rows = [out.logits[0, -1]]
    for token in instance.ids[len(instance.prompt) :]:
        out = forward(model, torch.tensor([[token]]), use_cache=True, past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    judged = [p - instance.positions[0] for p in instance.positions]
    return torch.stack(rows)[judged].float().cpu()


def judge(
    model: HookedModel,
    task: Task,
    instances: Sequence[Instance],
    edits: Sequence[Edit] = (),
    stepwise: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """(correct, margin) of each instance under edits."""
    found: list[tuple[float, float]] = []
    with model.edit(*edits):
        for batch in batches(instances, pad_id(model.tokenizer)):
            for instance, logits in zip(batch.instances, answer_logits(model, batch, stepwise), strict=True):
                found.append(task.score(logits, instance))
            if progress:
                progress(len(found))
    return found


def sample(model: HookedModel, task: str | Task, n: int, seed: int) -> tuple[Task, list[Instance]]:
    """The task and `n` instances for this model. Raises `InputError`, `ContextError`."""
    if n < 1:
        raise InputError("An evaluation needs at least one instance; use n ≥ 1.")
    chosen = tasks.get(task) if isinstance(task, str) else task
    limit = model.max_context
    if isinstance(task, str) and hasattr(chosen, "at") and limit is not None:
        chosen = chosen.at(min(1024, limit))
    instances = chosen.sample(model.tokenizer, n, seed)
    check_context(model, max(len(i.ids) for i in instances))
    return chosen, instances


def evaluate(
    model: Any,
    task: str | Task = "niah",
    edits: Sequence[Edit] = (),
    n: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy on `n` seeded problems, untouched and (with `edits`) edited, with paired bootstrap intervals.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, or a task with settings of its own.
        edits: applied left to right. Where one acts only at prefill or decode, answers are fed step by step.

    Raises:
        UnknownNameError, InputError, ContextError, EditError, HeadError.
    """
    import pandas as pd

    from interp.loading import load

    if isinstance(task, str):
        tasks.get(task)
    hooked = load(model)
    chosen, instances = sample(hooked, task, n, seed)
    stepwise = any(e.scope != "all" for e in edits)
    total = n * (2 if edits else 1)
    tell = progress or (lambda done, total, what: None)
    plain = judge(hooked, chosen, instances, (), stepwise, lambda k: tell(k, total, "untouched"))
    frame = pd.DataFrame(plain, columns=["baseline", "baseline_margin"])
    baseline = bootstrap(frame.baseline.tolist(), seed)
    metric = {"exact": "exact answers"}.get(chosen.judge, "accuracy")
    if not edits:
        return Evaluation(chosen.name, metric, baseline, None, None, frame)
    changed = judge(hooked, chosen, instances, edits, stepwise, lambda k: tell(n + k, total, "edited"))
    frame["edited"], frame["edited_margin"] = zip(*changed, strict=True)
    return Evaluation(
        chosen.name,
        metric,
        baseline,
        bootstrap(frame.edited.tolist(), seed),
        bootstrap((frame.edited - frame.baseline).tolist(), seed),
        frame,
    )
