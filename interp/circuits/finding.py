"""One circuit search from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.circuits.circuit import Circuit
from interp.circuits.methods.catalogue import as_method
from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.ability import able, metric_of
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.errors import InputError, InterpError, OutputError, TapError
from interp.inputs.forward import forward
from interp.inputs.pieces import pieces
from interp.inputs.text import check_seed
from interp.results.circuit_table import Example, Search
from interp.results.frame import rows_of
from interp.results.head_table import About
from interp.support.checkpoints import Checkpoints
from interp.support.ownership import owned
from interp.support.progress import Shown, reporting
from interp.support.provenance import provenance
from interp.support.statistics import Interval, bootstrap, resampled_means
from interp.tasks.task import Task

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: prompts, and tokens of an answer, that a circuit keeps as text
SHOWN = 6
#: below this accuracy the user is told that the circuit is one of a task half done
POOR = 0.8


@dataclass(frozen=True)
class Posed:
    """A search before it runs: the model, the method, the prompts, and where its result will come
    from (`record["fingerprint"]` tells it from any other)."""

    model: HookedModel
    method: Method
    prompts: Prompts
    record: dict[str, Any]


def pose(
    model: Any,
    task: str | Task | Prompts,
    method: str | Method,
    n: int,
    seed: int,
    *,
    preset: str | None = None,
    format: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Posed:
    """The search that `find` with the same arguments does."""
    from interp.loading import load

    check_seed(seed)
    searcher = as_method(method, preset, dict(settings or {}))
    hooked = load(model)
    with hooked.clean():  # what is active outside must not be measured, and is no part of it
        prompts = task if isinstance(task, Prompts) else from_task(hooked, task, n, seed, format)
        record = provenance(
            hooked,
            seed,
            dict(
                task=prompts.name,
                format=prompts.task.format,
                method=searcher.name,
                n=len(prompts),
                context=max(len(i.ids) for i in prompts.instances),
                samples=len(prompts),
                backend=hooked.backend,
                **{f"{searcher.name}.{k}": v for k, v in searcher.record().items()},
            ),
            prompts.recorded(),
            [searcher, prompts.task],
        )
        record |= _blocks(hooked, prompts)
    return Posed(hooked, searcher, prompts, record)


def _blocks(model: HookedModel, prompts: Prompts) -> dict[str, Any]:
    """`d_model`, the width of the stream, and `parallel`, whether MLPs read beside the attention:
    what files of other toolkits ask for. {} where the stream can't be seen."""
    ids = torch.tensor([prompts.instances[0].ids], device=model.device)
    try:
        with torch.no_grad(), model.capture_resid() as resid:
            forward(model, ids, keep=1)
    except TapError:
        return {}
    layers = [key[1] for key in resid if key[0] == "pre"]
    if not layers:
        return {}
    width = int(resid["pre", layers[0]].shape[-1])
    return dict(d_model=width, parallel=("mid", layers[0]) not in resid)


@reporting("Finding the circuit")
def find(
    model: Any,
    task: str | Task | Prompts = "ioi",
    method: str | Method = "eap",
    n: int = 128,
    seed: int = 0,
    *,
    preset: str | None = None,
    format: str | None = None,
    force: bool = False,
    progress: Shown = None,
    resume: str | Path | None = None,
    **settings: Any,
) -> Circuit:
    """Finds the circuit of a task: scores every head of the main tower by one method.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, a task with settings of its own, or `interp.circuits.prompts` of one's own.
        method: a name (`interp.circuits.names()`), a `Method` with its settings, or a function of
            one's own in a file, "FILE.py:function": (model, prompts) → scores.
        n: pairs of prompts, clean and corrupted; of `Prompts`, all are used.
        seed: of the prompts and of what the method draws.
        preset: settings under a name, such as "paper"; `settings` come on top.
        format: of the prompts; the one that the model understands best if not given.
        force: go on where the model can't do the task.
        progress: True for a bar with the time left, or a function (done, total, what).
        resume: a folder in which what is finished is kept until the end, so that an interrupted
            search resumes (`head_ablation`, `acdc`; the other methods begin again).
        settings: the method's.

    Returns:
        A `Circuit`: an atlas whose column, named as the method, says how surely or strongly each
        head takes part.

    Raises:
        UnknownNameError: no such task or method.
        FloorError: the model can't do the task.
        InputError: pairs of unequal length, no negative examples,
            answers of several tokens.
        ContextError: a prompt past the model's positions.
        TapError: the method needs what this architecture does not offer.

    Example:
        >>> circuit = interp.circuits.find(model, "ioi", "eap", n=8)
        >>> circuit["eap"].shape, list(circuit.edges)
        ((4, 8), ['sender', 'receiver', 'kind', 'score'])
    """
    search = pose(model, task, method, n, seed, preset=preset, format=format, settings=settings)
    hooked, searcher, prompts, record = search.model, search.method, search.prompts, search.record
    with hooked.clean(), owned(resume):
        started = time.perf_counter()
        accuracy, clean, floor = able(hooked, prompts, seed, force)
        done = Checkpoints(None if resume is None else Path(resume), record)
        runs = PairedRuns(hooked, prompts, seed, progress, done)
        corrupted = bootstrap(runs.margins(corrupted=True).tolist(), seed)
        ready = runs.forwards
        try:
            with done.resumable():
                result = searcher.find(runs)
        except OutputError:  # no room: what is there is worth keeping
            raise
        except InterpError:  # there will be nothing to resume
            done.clear()
            raise
        record["seconds"] = round(time.perf_counter() - started, 3)
    about = Search(
        prompts.name,
        searcher.name,
        len(prompts),
        accuracy,
        clean,
        corrupted,
        round(runs.forwards - ready, 3),
        round(runs.backwards, 3),
        record["seconds"],
        metric_of(prompts),
    )
    said = [note for note in (prompts.note, floor) if note]
    notes = [*said, *_notes(prompts, accuracy, clean, corrupted), *result.notes]
    notes += done.notes
    circuit = circuit_of(runs, searcher, result, about, record, notes)
    circuit.examples = examples(prompts, hooked.tokenizer)
    with owned(resume):
        done.clear()
    return circuit


def examples(prompts: Prompts, tokenizer: Any) -> list[Example]:
    """The first prompts as text, clean and corrupted side by side."""

    def words(ids: Iterable[int]) -> tuple[str, ...]:
        return tuple(pieces(tokenizer, [i])[0] for i in ids)

    return [
        Example(
            tuple(pieces(tokenizer, i.ids)),
            tuple(pieces(tokenizer, i.corrupted)),
            words(i.accept[0][:SHOWN]),
            words(i.wrong[0][:SHOWN]),
        )
        for i in prompts.instances[:SHOWN]
    ]


def circuit_of(
    runs: PairedRuns,
    method: Method,
    found: Found,
    search: Search,
    record: dict[str, Any],
    notes: list[str],
) -> Circuit:
    """The table of what was found. Raises `InputError` where a score is not finite."""
    score = np.asarray(found.score, dtype=np.float64)
    if score.shape != (len(runs.heads),) or not np.isfinite(score).all():
        raise InputError(
            f"The method {method.name} gave no finite score for every head of {runs.model.name}."
        )
    name = method.name
    frame = rows_of(runs.sites.values())
    frame[name] = score
    for part in ("stderr", "low", "high"):
        values = getattr(found, part)
        if values is not None:
            frame[f"{name}_{part}"] = values
    unit = search.unit if method.unit == "metric" else method.unit
    about = {
        name: About(method.title, method.caption(), method.formula, method.citation, unit, low=0.0)
    }
    if found.effect is not None:
        frame[f"{name}_effect"] = found.effect
        if found.effects is not None and found.effects.shape[1] > 1:
            means = resampled_means(found.effects, runs.seed)  # (heads, resamples)
            low, high = np.quantile(means, [0.025, 0.975], axis=1)
            spread = found.effects.std(1, ddof=1) / np.sqrt(found.effects.shape[1])
            for part, values in (("stderr", spread), ("low", low), ("high", high)):
                frame[f"{name}_effect_{part}"] = values
        about[f"{name}_effect"] = About(
            f"{method.title}, signed",
            method.effect_reading,
            method.formula,
            method.citation,
            unit,
        )
    return Circuit(
        frame,
        record,
        search,
        found.edges,
        notes,
        about,
        artefacts=found.artefacts,
        effects=found.effects,
    )


def _notes(prompts: Prompts, accuracy: Interval, clean: Interval, corrupted: Interval) -> list[str]:
    notes = []
    if accuracy.mean < POOR:
        notes.append(
            f"{prompts.name}: the model solves {accuracy.mean:.0%} of the prompts, so its circuit "
            "is to be read with "
            "care."
        )
    if corrupted.high >= clean.low:
        notes.append(
            f"{prompts.name}: corrupting the prompts hardly changes the metric ({clean.mean:.2f} "
            "to "
            f"{corrupted.mean:.2f}), so there is little to attribute to any head."
        )
    return notes
