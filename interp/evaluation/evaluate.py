"""Evaluate a model on a task, with and without edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp import tasks
from interp.edits.head_edit import HeadEdit
from interp.errors import EditError, InputError
from interp.evaluation.loss import continuation_loss, past, rows_for_loss
from interp.inputs.batches import fits
from interp.inputs.context import check_context, extrapolation
from interp.inputs.forward import forward
from interp.inputs.text import check_seed, read_text
from interp.inputs.tokenizer import pad_id
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.provenance import provenance
from interp.tasks.images import ImageTask
from interp.tasks.task import Batch, Instance, Task, collate
from interp_hooks.edit import Edit
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

__all__ = ["Evaluation", "continuation_loss", "evaluate"]

Progress = Callable[[int, int, str], None]
#: tokens run together
#: what the names of lm-evaluation-harness's tasks begin with here
PREFIX = "lm_eval:"


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
    found: list[tuple[float, float]] = []
    with model.edit(*edits):
        for batch in batches(instances, pad_id(model.tokenizer)):
            for instance, logits in zip(
                batch.instances, answer_logits(model, batch, stepwise), strict=True
            ):
                found.append(task.score(logits, instance))
            if progress:
                progress(len(found))
    return found


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


def evaluate(
    model: Any,
    task: str | Task | None = None,
    edits: Sequence[Edit] = (),
    n: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    metric: str | None = None,
    context: int | None = None,
    extrapolate: bool = False,
    text: str | Path | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> Evaluation:
    """`n` seeded problems, untouched and (with `edits`) edited: paired bootstrap interval,
    McNemar's exact test.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name ("niah" if not given), a task with settings of its own, or "lm_eval:NAME", a
            task of lm-evaluation-harness (needs the extra `lm-eval`).
        edits: applied left to right. Where one acts only at prefill or decode, answers are fed step
            by step.
        metric: None for the task's own; "loss": mean next-token loss of the second half of rows of
            text given the first (`continuation_loss`), rows of the task's solved problems or,
            without task, of `text` or generated prose; a metric of the harness's task.
        context: tokens of every needle prompt or row of text. If not given: needles of a quarter, a
            half and the whole of 1024 or the model's limit; rows of 512.
        extrapolate: allow a context past the model's positions; the record says so.
        text: a text file for the loss.
        limit: another name of `n`, the harness's.
        include_path: a folder of the harness's tasks (YAML).

    Raises:
        UnknownNameError, InputError, ContextError, EditError, HeadError.
    """
    from interp.loading import load

    check_seed(seed)
    n = n if limit is None else limit
    harness = isinstance(task, str) and task.startswith(PREFIX)
    _check_options(task, metric, text, include_path, harness)
    edits = _given(edits)
    content = read_text(text) if text is not None else None
    if isinstance(task, str) and harness:
        from interp.evaluation import lm_eval

        lm_eval.check_installed()
        hooked = _bound(load(model), edits)
        return lm_eval.evaluate(
            hooked,
            task.removeprefix(PREFIX),
            edits,
            n,
            seed,
            progress,
            metric,
            context,
            extrapolate,
            include_path,
        )
    chosen = (
        tasks.get(task) if isinstance(task, str) else task
    )  # an unknown name is found before the model is loaded
    hooked = _bound(load(model), edits)
    if isinstance(chosen, ImageTask):
        from interp.evaluation.pictures import evaluate_images

        if metric not in (None, "accuracy") or context is not None:
            raise InputError(f"The task {chosen.name} has its own metrics and no length to choose.")
        return evaluate_images(hooked, chosen, edits, n, seed, progress)
    if metric == "loss":
        if n < 1:
            raise InputError("An evaluation needs at least one row; use n ≥ 1.")
        length = context or min(512, hooked.max_context or 512)
        check_context(hooked, length, extrapolate)
        rows = rows_for_loss(hooked, chosen, content, length, n, seed)
        what = chosen.name if chosen is not None else "text" if content is not None else "prose"
        return continuation_loss(
            hooked, rows, edits, seed=seed, extrapolate=extrapolate, progress=progress, what=what
        )
    return _accuracy(hooked, task or "niah", edits, n, seed, progress, context, extrapolate)


def _given(edits: Any) -> list[Edit]:
    """Edits as a list. Raises `EditError` for what is none."""
    found = [edits] if isinstance(edits, Edit) else edits
    if isinstance(found, (str, Path)) or not all(isinstance(e, Edit) for e in found):
        raise EditError(
            "Edits are objects of interp.edits; interp.edits.load reads a file, from_json a "
            "dictionary."
        )
    return list(found)


def _bound(model: HookedModel, edits: Sequence[Edit]) -> HookedModel:
    """The model; an edit that it can't take is told before anything runs."""
    with model.edit(*edits):
        return model


def _check_options(
    task: str | Task | None, metric: str | None, text: object, include_path: object, harness: bool
) -> None:
    """Raise `InputError` for options that don't go together."""
    if not harness and metric not in (None, "accuracy", "loss"):
        raise InputError(f"There is no metric {metric!r}; use accuracy or loss.")
    if not harness and include_path is not None:
        raise InputError(
            "include_path holds tasks of lm-evaluation-harness; name one as lm_eval:NAME."
        )
    if text is not None and (metric != "loss" or task is not None):
        raise InputError("A text is for the loss without a task; use metric loss and no task.")


def _accuracy(
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
    tell = progress or (lambda done, total, what: None)
    plain = judge(hooked, chosen, instances, (), stepwise, lambda k: tell(k, total, "untouched"))
    frame = pd.DataFrame(plain, columns=["baseline", "baseline_margin"])
    if edits:
        changed = judge(
            hooked, chosen, instances, edits, stepwise, lambda k: tell(n + k, total, "edited")
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
    found = asdict(task)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
