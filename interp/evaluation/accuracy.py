"""Right and wrong answers to a task's problems, with and without edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.edits.head_edit import HeadEdit
from interp.errors import InputError
from interp.evaluation.loss import past
from interp.inputs.batches import fits
from interp.inputs.context import check_context, extrapolation
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.provenance import provenance
from interp.tasks.task import Batch, Instance, Task, collate
from interp_hooks.edit import Edit
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

Progress = Callable[[int, int, str], None]


def batches(instances: Sequence[Instance], pad: int) -> Iterator[Batch]:
    """Left-padded batches of similar lengths within the token budget, in order of the instances."""
    group: list[Instance] = []
    for instance in instances:
        width = max(len(i.ids) for i in [*group, instance])
        if group and (not fits(width, len(group) + 1) or len(instance.ids) > 2 * len(group[0].ids)):
            yield collate(group, pad)
            group = []
        group.append(instance)
    if group:
        yield collate(group, pad)


@torch.no_grad()
def answer_logits(model: HookedModel, batch: Batch, stepwise: bool = False) -> list[torch.Tensor]:
    """(judged positions, vocabulary) float32 of each instance.

    `stepwise`: prefill each prompt and feed the answer token by token through the cache, so that
    edits with a prefill or decode scope act as they do in generation.
    """
    if stepwise and model.has_cache:
        return [_by_steps(model, instance) for instance in batch.instances]
    width = batch.input_ids.shape[1]
    first = min(
        p + o for i, o in zip(batch.instances, batch.offset, strict=True) for p in i.positions
    )
    out = forward(model, batch.input_ids, batch.attention_mask, keep=width - first)
    logits = logits_of(out)
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
        out = forward(
            model, torch.tensor([[token]]), use_cache=True, past_key_values=out.past_key_values
        )
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
    scores: list[tuple[float, float]] = []
    with model.edit(*edits):
        for batch in batches(instances, pad_id(model.tokenizer)):
            for instance, logits in zip(
                batch.instances, answer_logits(model, batch, stepwise), strict=True
            ):
                scores.append(task.score(logits, instance))
            if progress:
                progress(len(scores))
    return scores


def sample(
    model: HookedModel,
    task: str | Task,
    n: int,
    seed: int,
    context: int | None = None,
    extrapolate: bool = False,
) -> tuple[Task, list[Instance]]:
    """The task and `n` instances for this model. Raises `InputError`, `ContextError`."""
    if n < 1:
        raise InputError("An evaluation needs at least one instance; use n ≥ 1.")
    chosen = tasks.get(task) if isinstance(task, str) else task
    limit = model.max_context
    if context is not None:
        if not hasattr(chosen, "exactly"):
            raise InputError(
                f"The task {chosen.name} has no length to choose; context is for niah and for "
                "losses."
            )
        chosen = chosen.exactly(context)
    elif isinstance(task, str) and hasattr(chosen, "at") and limit is not None:
        chosen = chosen.at(min(1024, limit))
    instances = chosen.sample(model.tokenizer, n, seed)
    check_context(model, max(len(i.ids) for i in instances), extrapolate)
    return chosen, instances


def accuracy(
    hooked: HookedModel,
    task: str | Task,
    edits: Sequence[Edit],
    n: int,
    seed: int,
    progress: Progress | None,
    context: int | None,
    extrapolate: bool,
) -> Evaluation:
    """Right and wrong answers of one of our own tasks."""
    import pandas as pd

    chosen, instances = sample(hooked, task, n, seed, context, extrapolate)
    stepwise = by_steps(edits)
    total = n * (2 if edits else 1)
    report = progress or (lambda done, total, what: None)
    plain = judge(hooked, chosen, instances, (), stepwise, lambda k: report(k, total, "untouched"))
    frame = pd.DataFrame(plain, columns=["baseline", "baseline_margin"])
    if edits:
        changed = judge(
            hooked, chosen, instances, edits, stepwise, lambda k: report(n + k, total, "edited")
        )
        frame["edited"], frame["edited_margin"] = zip(*changed, strict=True)
    longest = max(len(i.ids) for i in instances)
    beyond = extrapolation(hooked, longest)
    settings = dict(
        task=chosen.name,
        task_settings=_settings(chosen),
        metric="accuracy",
        n=n,
        steps=stepwise,
        context=longest,
        extrapolate=beyond,
        edits=edits_as_json(edits),
        backend=hooked.backend,
    )
    record = provenance(hooked, seed, settings, [torch.tensor(i.ids) for i in instances])
    metric = {"exact": "exact answers"}.get(chosen.judge, "accuracy")
    return summarise(chosen.name, metric, frame, seed, record, [past(beyond)] if beyond else [])


def by_steps(edits: Sequence[Edit]) -> bool:
    """Whether answers are fed token by token: an edit has a scope, or picks its rows by what a
    forward holds."""
    own_rows = (Edit.rows, HeadEdit.rows)
    return any(e.scope != "all" or type(e).rows not in own_rows for e in edits)


def _settings(task: Task) -> dict[str, Any]:
    """The fields of a task that is a dataclass, as JSON holds them."""
    if not is_dataclass(task):
        return {}
    values = asdict(task)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
