"""Evaluate a model on a task, with and without edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import tasks
from interp.errors import EditError, InputError
from interp.evaluation.accuracy import accuracy
from interp.evaluation.controlled import Once, controlled
from interp.evaluation.loss import continuation_loss, rows_for_loss
from interp.evaluation.shots import Shots
from interp.inputs.context import check_context
from interp.inputs.text import check_seed
from interp.inputs.text import content as text_of
from interp.results.evaluation import Evaluation
from interp.support.checked import whole_number
from interp.support.progress import Shown, reporting
from interp.tasks.answers import Judging, judge
from interp.tasks.images import ImageTask
from interp.tasks.task import Task
from interp_hooks.edit import Edit, edits_of
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

__all__ = ["Evaluation", "continuation_loss", "evaluate"]

Progress = Callable[[int, int, str], None]
#: what the names of lm-evaluation-harness's tasks begin with here
PREFIX = "lm_eval:"


@reporting("Evaluating")
def evaluate(
    model: Any,
    task: str | Task | None = None,
    edits: Sequence[Edit] = (),
    n: int = 32,
    seed: int = 0,
    progress: Shown = None,
    *,
    metric: str | None = None,
    context: int | None = None,
    extrapolate: bool = False,
    text: str | Path | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    format: str | None = None,
    force: bool = False,
    num_fewshot: int | None = None,
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool | None = None,
    judging: Judging | None = None,
    controls: int = 0,
) -> Evaluation:
    """Measures a task's metric on seeded problems, untouched and edited, with paired intervals.

    With `edits`: a paired bootstrap interval of the difference, and McNemar's exact test where
    answers are right or wrong.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name ("niah" if not given), a task with settings of its own, or "lm_eval:NAME", a
            task of lm-evaluation-harness (needs the extra `lm-eval`).
        edits: applied left to right. Where one acts only at prefill or decode, answers are fed step
            by step.
        n: problems.
        seed: of the problems.
        progress: True for a bar with the time left, or a function (done, total, what).
        metric: None for the task's own; "loss": mean next-token loss of the second half of rows of
            text given the first (`continuation_loss`), rows of the task's solved problems or,
            without task, of `text` or generated prose; a metric of the harness's task.
        context: tokens of every needle prompt or row of text. If not given: needles of a quarter, a
            half and the whole of 1024 or the model's limit; rows of 512.
        extrapolate: allow a context past the model's positions; the record says so.
        text: a text for the loss, or a `Path` to one.
        limit: another name of `n`, the harness's.
        include_path: a folder of the harness's tasks (YAML).
        format: of the prompts ("bare", "lead", "few-shot", "chat", for niah "paper"); if not given,
            the one that the model understands best of a named task, and a task object's own.
        force: go on where the untouched model can't do the task.
        num_fewshot: solved documents before each of a harness's task; None for the task's own.
        apply_chat_template: put a harness's prompts into the tokenizer's chat template (or the one
            of that name).
        fewshot_as_multiturn: each shot as turns of the chat; None as the harness has it.
        judging: who judges the answers of the toolkit's own tasks; None for this process
            (`interp.cluster` has its own).
        controls: so many times the same edits of as many random heads of the same layers; 0 for
            none. Not for the harness's tasks.

    Returns:
        An `Evaluation`; `edited` and `difference` are None without edits.

    Raises:
        FloorError: the untouched model can't do the task.
        UnknownNameError, InputError, ContextError, EditError, HeadError.

    Example:
        >>> found = interp.evaluate(model, "induction", n=4)
        >>> found.metric, found.baseline.mean
        ('accuracy', 1.0)
    """
    from interp.loading import load

    check_seed(seed)
    n = whole_number(n if limit is None else limit, "n, the number of problems,")
    context = None if context is None else whole_number(context, "The context")
    harness = isinstance(task, str) and task.startswith(PREFIX)
    _check_options(task, metric, text, include_path, harness)
    if format is not None and (harness or metric == "loss"):
        raise InputError(
            "A format is of the toolkit's own tasks, when answers are judged; leave it out."
        )
    shots = Shots(num_fewshot, apply_chat_template, fewshot_as_multiturn)
    if shots != Shots() and not harness:
        raise InputError(
            "Shots and chat templates of this kind are lm-evaluation-harness's; name one of its "
            "tasks as lm_eval:NAME, or give format=."
        )
    edits = _given(edits)
    controls = whole_number(controls, "controls, how many draws of random heads,")
    if controls < 0 or (controls and (harness or not edits)):
        raise InputError(
            "Random heads stand beside edits, on the toolkit's own tasks; controls is how many "
            "draws of them."
        )
    content = text_of(text) if text is not None else None
    pictures = isinstance(task, ImageTask) or (
        isinstance(task, str) and not harness and isinstance(tasks.get(task), ImageTask)
    )
    if judging is not None and (harness or pictures or metric == "loss"):
        raise InputError(
            "Workers share right and wrong answers to the toolkit's own tasks; losses, pictures "
            "and lm-evaluation-harness run in one process: leave workers out."
        )
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
            shots,
        )
    chosen = (
        tasks.get(task) if isinstance(task, str) else task
    )  # an unknown name is found before the model is loaded
    hooked = _bound(load(model), edits)
    once = Once(judging or judge)
    report = progress or (lambda done, total, what: None)
    runs = 0

    def measured(edits: Sequence[Edit], what: str) -> Evaluation:
        nonlocal runs
        before, runs = runs, runs + 1

        def counted(done: int, total: int, now: str) -> None:
            report(before * total + done, (1 + controls) * total, now if not before else what)

        if isinstance(chosen, ImageTask):
            from interp.evaluation.pictures import evaluate_images

            if metric not in (None, "accuracy") or context is not None or format is not None:
                raise InputError(
                    f"The task {chosen.name} has its own metrics and neither a length nor a format "
                    "to choose."
                )
            return evaluate_images(hooked, chosen, edits, n, seed, counted)
        if metric == "loss":
            if n < 1:
                raise InputError("An evaluation needs at least one row; use n ≥ 1.")
            length = context or min(512, hooked.max_context or 512)
            check_context(hooked, length, extrapolate)
            rows = rows_for_loss(hooked, chosen, content, length, n, seed)
            about = (
                chosen.name if chosen is not None else "text" if content is not None else "prose"
            )
            return continuation_loss(
                hooked,
                rows,
                edits,
                seed=seed,
                extrapolate=extrapolate,
                progress=counted,
                what=about,
            )
        return accuracy(
            hooked, task or "niah", edits, n, seed, counted, context, extrapolate, format, force,
            once,
        )  # fmt: skip

    if not controls:
        return measured(edits, "")
    return controlled(hooked, edits, controls, seed, measured)


def _given(edits: Any) -> list[Edit]:
    """Edits as a list. Raises `EditError` for what is none."""
    items = edits_of(edits)
    for live in items:
        if not isinstance(live, Edit):
            raise EditError(
                f"{quoted(live)} is for one block of one model; an evaluation takes objects of "
                "interp.edits."
            )
    return items


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
