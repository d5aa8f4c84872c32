"""Any task of lm-evaluation-harness, baseline against edited, paired sample by sample (optional
extra `lm-eval`).

The harness brings the tasks: documents, prompts, filters and metrics. Its HuggingFace model object
is built on the tapped module and runs inside `model.edit(...)`. Log-likelihoods are taken here
rather than there: rows are padded on the left and masked, and where an edit has a scope each
context is prefilled and its continuation fed token by token, so that an edit of the prompt never
sees the answer it is to predict.
"""

from __future__ import annotations

import copy
import difflib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError, UnknownNameError
from interp.evaluation.accuracy import by_steps
from interp.evaluation.loss import past
from interp.evaluation.shots import Shots
from interp.inputs.batches import left_padded, rows_of
from interp.inputs.context import check_context, extrapolation
from interp.inputs.forward import forward
from interp.inputs.tokenizer import pad_id
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.extras import need
from interp.support.provenance import provenance, version_of

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

#: metrics in the order in which one is taken when none is named
METRICS = ("acc", "exact_match", "em", "acc_norm", "f1", "mcc")
BATCH = 8  # prompts generated together


def check_installed() -> None:
    """Raise `MissingExtraError` unless lm-evaluation-harness can be imported."""
    for module in ("lm_eval", "accelerate"):
        need(module, extra="lm-eval", what="Tasks of lm-evaluation-harness")


def evaluate(
    model: HookedModel,
    name: str,
    edits: Sequence[Edit] = (),
    n: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    metric: str | None = None,
    context: int | None = None,
    extrapolate: bool = False,
    include_path: str | Path | None = None,
    shots: Shots = Shots(),
) -> Evaluation:
    """The first `n` documents of the harness's task (of each task, for a group), untouched and
    edited.

    Raises `InputError`, `UnknownNameError`, `ContextError`, `EditError`, `HeadError`.
    """
    import pandas as pd

    if n < 1:
        raise InputError("An evaluation needs at least one instance; use n ≥ 1.")
    check_model(model)
    shots.check(model.tokenizer)
    if context is not None:
        check_context(model, context, extrapolate)
    with _quiet():
        harness_tasks = _tasks(name, include_path)
        stepwise = by_steps(edits) or model.gives_caches
        report = progress or (lambda done, total, what: None)
        total = n * (2 if edits else 1)
        lm = _language_model(model, stepwise, context)
        lm.report = lambda share: report(round(n * share), total, "untouched")
        plain, metric = _run(lm, harness_tasks, n, seed, metric, shots)
        frame = pd.DataFrame({"task": [s[0] for s in plain], "doc_id": [s[1] for s in plain]})
        frame["baseline"] = [s[3] for s in plain]
        if edits:
            lm.report = lambda share: report(n + round(n * share), total, "edited")
            with model.edit(*edits):
                changed, _ = _run(lm, harness_tasks, n, seed, metric, shots)
            if [s[:3] for s in changed] != [s[:3] for s in plain]:
                raise InputError(
                    f"The task {name} gave other documents the second time, so answers can't be "
                    "paired."
                )
            frame["edited"] = [s[3] for s in changed]
    beyond = extrapolation(model, lm.longest)
    notes = [past(beyond)] if beyond else []
    if lm.cut:
        notes.append(
            f"{lm.cut} requests were longer than {lm.max_length} tokens and lost their beginning."
        )
    settings = dict(
        task=f"lm_eval:{name}",
        metric=metric,
        n=n,
        steps=stepwise,
        context=lm.longest,
        extrapolate=beyond,
        edits=edits_as_json(edits),
        backend=model.backend,
        **shots.record(),
    )
    documents = torch.frombuffer(
        bytearray("".join(s[2] for s in plain).encode()), dtype=torch.uint8
    )
    record = provenance(model, seed, settings, [documents], list(edits))
    record["versions"]["lm-eval"] = version_of("lm-eval")
    return summarise(f"lm_eval:{name}", metric, frame, seed, record, notes)


def check_model(model: HookedModel) -> None:
    """Raise `InputError` for models that the harness can't run."""
    from transformers import PreTrainedModel

    if not isinstance(model.module, PreTrainedModel) or model.module.config.is_encoder_decoder:
        raise InputError(
            f"lm-evaluation-harness is run on decoder-only HuggingFace models; {model.name} is "
            "none."
        )
    if model.tokenizer is None:
        raise InputError(
            f"{model.name} came without a tokenizer; pass interp.load(model, tokenizer=...)."
        )


def _tasks(name: str, include_path: str | Path | None) -> list[Any]:
    """The harness's task objects called `name`: one, or those of a group or tag."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(
            f"There is no folder {include_path}; include_path is a folder of YAML tasks."
        )
    manager = None
    if (
        include_path is not None
    ):  # its own folder alone first: indexing the harness's 15 thousand names takes seconds
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or name not in manager.all_tasks:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
        raise UnknownNameError(f"lm-evaluation-harness has no task called {name!r}; {hint}")
    try:
        harness_tasks = list(manager.load([name])["tasks"].values())
    except Exception as error:  # whatever a task's own code, its data or the network has to say
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"The task {name} of lm-evaluation-harness can't be loaded: {line}"
        ) from error
    if any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in harness_tasks):
        raise InputError(
            f"The task {name} measures perplexity, not answers; use metric loss on your own text "
            "instead."
        )
    return harness_tasks


def _run(
    lm: Any, found: list[Any], n: int, seed: int, metric: str | None, shots: Shots
) -> tuple[list[tuple[Any, ...]], str]:
    """(task, document, its hash, value) of every sample, and the metric's name."""
    from lm_eval.evaluator import evaluate as run

    # as its simple_evaluate does, which would also look at the machine for ten seconds
    shots.prepare(found, seed)
    with _seeded(seed):
        try:
            tasks = {"tasks": {task.task_name: task for task in found}, "groups": {}}
            result = run(
                lm, tasks, limit=n, bootstrap_iters=0, log_samples=True, **shots.run_options()
            )
        except (ValueError, AssertionError) as error:
            raise InputError(f"lm-evaluation-harness refuses this task: {error}") from error
    assert result is not None  # None only on ranks other than the first
    samples: list[tuple[Any, ...]] = []
    for task, rows in sorted(result["samples"].items()):
        first = rows[0]["filter"]  # a task may read answers in several ways: the first
        for row in rows:
            if row["filter"] == first:
                metric = metric or _choose(row)
                if (
                    not isinstance(row.get(metric), (bool, int, float, np.number))
                    or metric not in row["metrics"]
                ):
                    names = ", ".join(row["metrics"])
                    raise InputError(
                        f"The task {task} has no number {metric!r} for each sample; it has {names}."
                    )
                samples.append((task, row["doc_id"], row["doc_hash"], float(row[metric])))
    assert metric is not None
    return samples, metric


def _choose(row: dict[str, Any]) -> str:
    """The metric to take when none was named."""
    numbers = [m for m in row["metrics"] if isinstance(row[m], (bool, int, float, np.number))]
    return next(
        (m for m in METRICS if m in numbers), next(iter(numbers), next(iter(row["metrics"]), "acc"))
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators seeded, as the harness's tasks expect; afterwards they are as
    before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only, and no bars of its own: what the harness warns of is checked here, or in the
    notes."""
    import datasets
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar, bars = (
        logger.level,
        getattr(task, "tqdm", None),
        not datasets.are_progress_bars_disabled(),
    )
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    if bar is not None:
        task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if bar is not None:
            task.tqdm = bar


def _language_model(model: HookedModel, stepwise: bool, context: int | None) -> Any:
    """The harness's HuggingFace model on the tapped module."""
    from lm_eval.models.huggingface import HFLM

    class Tapped(HFLM):
        report: Callable[[float], None]
        cut = longest = 0

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = True
        ) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, ctx, answer in requests:
                whole = (ctx + answer)[-(self.max_length + 1) :]
                self._note(len(whole) - 1, len(whole) < len(ctx) + len(answer))
                pairs.append((tuple(whole[: -len(answer)]), tuple(answer)))
            return log_likelihoods(model, pairs, stepwise, self.report)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                prompt, settings = request.args
                room = self.max_length - settings.get("max_gen_toks", self.max_gen_toks)
                length = len(self.tok_encode(prompt))
                self._note(min(length, room), length > room)
            texts = super().generate_until(requests, disable_tqdm=True)
            self.report(1.0)
            return texts

        def _note(self, length: int, cut: bool) -> None:
            self.longest, self.cut = max(self.longest, length), self.cut + cut

    # a copy of the tokenizer, for the harness gives it a padding token
    tokenizer = copy.deepcopy(model.tokenizer)
    return Tapped(
        pretrained=model.module,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=BATCH,
        max_length=context,
    )


@torch.no_grad()
def log_likelihoods(
    model: HookedModel,
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    stepwise: bool,
    report: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, bool]]:
    """(log-probability, whether greedy decoding gives it) of each answer after its context, both as
    token ids."""
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    done = 0
    for members, logits in _by_context(model, pairs) if stepwise else _together(model, pairs):
        for i in members:
            answer = torch.tensor(pairs[i][1], device=logits.device)
            rows = torch.log_softmax(logits[-len(answer) :].float(), -1)
            value = rows.gather(-1, answer[:, None]).sum()
            results[i] = float(value), bool((rows.argmax(-1) == answer).all())
        done += len(members)
        report(done / len(pairs))
    return results


def _together(
    model: HookedModel, pairs: Sequence[tuple[Any, Any]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Left-padded batches of what is fed; answers that differ in their last token share a row."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, (context, answer) in enumerate(pairs):
        members.setdefault(context + answer[:-1], []).append(i)
    order = sorted(members, key=len, reverse=True)
    pad = pad_id(model.tokenizer)
    while order:
        size = rows_of(len(order[0]))
        batch, order = order[:size], order[size:]
        ids, mask, _ = left_padded(batch, pad)
        keep = max(len(pairs[i][1]) for row in batch for i in members[row])
        logits = forward(model, ids, mask, keep=keep).logits
        yield from ((members[row], logits[b]) for b, row in enumerate(batch))


def _by_context(
    model: HookedModel, pairs: Sequence[tuple[Any, Any]]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Each context prefilled once, each answer fed token by token on top of it."""
    members: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        members.setdefault(context, []).append(i)
    for context, group in members.items():
        prompt = forward(model, torch.tensor([context]), use_cache=True, keep=1)
        for i in group:
            out, rows = prompt, [prompt.logits[0, -1]]
            cache = copy.deepcopy(prompt.past_key_values) if len(pairs[i][1]) > 1 else None
            for token in pairs[i][1][:-1]:
                out = forward(model, torch.tensor([[token]]), use_cache=True, past_key_values=cache)
                rows.append(out.logits[0, -1])
            yield [i], torch.stack(rows)
