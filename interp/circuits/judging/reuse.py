"""Do two tasks use the same heads? Circuits found stage by stage, their overlap, and the repair
experiment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from interp.circuits.methods.path_patching import check_main
from interp.circuits.methods.path_stages import Stage, stages
from interp.circuits.runs.ability import able
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.edits.overwrite_row import OverwriteRow
from interp.errors import InputError
from interp.inputs.text import check_seed
from interp.inputs.tokenizer import pad_id
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.progress import Shown, reporting
from interp.support.provenance import provenance
from interp.tasks.answers import answer_logits, batches
from interp_hooks.heads import Head, parse_heads

if TYPE_CHECKING:
    from interp.tasks.task import Instance, Task
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

Keys = Callable[["Instance"], Sequence[int]]


@dataclass(frozen=True)
class Reuse:
    """Which heads two tasks share.

    `frame`: a row a head: layer, head, for each task `<task>` (the first stage that the head is in,
    0 for none) and `<task>_effect_<i>` (its effect in stage i, see `PathPatching`), and `shared`.
    `by_stage`: a row a stage: what receives in each task, how many heads each has, how many are
    shared, `overlap` = shared / B's heads, and `expected`, the overlap by chance.

    `overlap` is the share of task B's heads, of all stages, that are in task A's; `expected` and
    `p` are its mean and P[as many or more shared] where B's heads are drawn at random, as many in
    each layer as there are: exact, by hypergeometric counts of each layer. Paper: 25 of 32, 78 %,
    in GPT-2 medium.
    """

    tasks: tuple[str, str]
    frame: pd.DataFrame
    by_stage: pd.DataFrame
    overlap: float
    expected: float
    p: float
    found: tuple[tuple[Stage, ...], tuple[Stage, ...]]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> list[Head]:
        """The heads of both tasks, by layer."""
        return sorted(set(self.heads(0)) & set(self.heads(1)))

    def heads(self, which: int) -> list[Head]:
        """All heads of the first (0) or second (1) task, in the order they were found."""
        return list(dict.fromkeys(h for stage in self.found[which] for h in stage.heads))

    def __repr__(self) -> str:
        a, b = self.tasks
        n = len(self.heads(1))
        return (
            f"Reuse({b} in {a}: {len(self.shared)} of {n} heads, {self.expected:.0%} by chance, "
            f"p = {self.p:.3g})"
        )


@reporting("Measuring reuse")
def reuse(
    model: Any,
    task_a: str | Task | Prompts = "ioi",
    task_b: str | Task | Prompts = "colored_objects",
    n: int = 128,
    seed: int = 0,
    *,
    share: float = 0.02,
    at_least: int = 3,
    depth: int = 2,
    activations: Sequence[str] = ("qkv",),
    least: float = 0.005,
    freeze_mlps: bool = False,
    force: bool = False,
    progress: Shown = None,
) -> Reuse:
    """The heads that two tasks share: their circuits by path patching, and the overlap by chance.

    Circuits are found from the output backwards (Merullo et al. 2024, ICLR, "Circuit component
    reuse across tasks in transformer language models").

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task_a, task_b: names, tasks with settings of their own, or `Prompts`.
        n: pairs of prompts a task.
        seed: of the prompts.
        share, at_least, depth, activations, least, freeze_mlps: see
            `interp.circuits.methods.path_stages.stages`; the paper takes 2 % a stage.
        force: go on where the model does no better than chance.
        progress: True for a bar with the time left, or a function (done, total, what).

    Returns:
        A `Reuse`: stages of both tasks head by head, the overlap, and p.

    Raises:
        InputError, UnknownNameError, ContextError: as `interp.circuits.find`.

    Example:
        >>> found = interp.circuits.reuse.reuse(model, "ioi", "ioi", n=4, depth=1)
        >>> found.overlap
        1.0
    """
    from interp.loading import load

    check_seed(seed)
    hooked = load(model)
    started, passes = time.perf_counter(), 0.0
    by_run: list[tuple[Stage, ...]] = []
    benches: list[PairedRuns] = []
    with hooked.clean():
        for task in (task_a, task_b):
            prompts = task if isinstance(task, Prompts) else from_task(hooked, task, n, seed)
            able(hooked, prompts, seed, force)
            benches.append(PairedRuns(hooked, prompts, seed, progress))
        for runs in benches:
            by_run.append(
                tuple(stages(runs, share, at_least, depth, activations, least, freeze_mlps))
            )
            passes += runs.forwards
    a, b = (runs.prompts.name for runs in benches)
    names = (a, b) if a != b else (f"{a}_1", f"{b}_2")
    one, two = ({h for stage in chain for h in stage.heads} for chain in by_run)
    sizes = {layer: site.n_heads for layer, site in benches[0].sites.items()}
    expected, p = chance(one, two, sizes)
    settings = dict(
        tasks=list(names),
        n=[len(x.prompts) for x in benches],
        share=share,
        at_least=at_least,
        depth=depth,
        activations=list(activations),
        least=least,
        freeze_mlps=freeze_mlps,
        backend=hooked.backend,
    )
    record = provenance(hooked, seed, settings, [t for x in benches for t in x.prompts.tensors()])
    record["seconds"], record["forwards"] = (
        round(time.perf_counter() - started, 3),
        round(passes, 3),
    )
    return Reuse(
        names,
        _frame(benches[0], names, by_run),
        _by_stage(names, by_run, sizes),
        len(one & two) / max(1, len(two)),
        expected,
        p,
        (by_run[0], by_run[1]),
        record,
    )


def chance(one: Iterable[Head], two: Iterable[Head], sizes: dict[int, int]) -> tuple[float, float]:
    """(expected share of `two` that is in `one`, P[as many or more]) where `two` is drawn at random
    among the heads of each layer, as many as there are; `sizes`: layer → heads."""
    one, two = set(one), set(two)
    ways = np.ones(1)  # ways[k] = P[k shared] over the layers so far
    for layer, n in sizes.items():
        a, b = (sum(h.layer == layer for h in heads) for heads in (one, two))
        here = [
            math.comb(a, k) * math.comb(n - a, b - k) / math.comb(n, b)
            for k in range(min(a, b) + 1)
        ]
        ways = np.convolve(ways, here)
    mean = float(np.arange(len(ways)) @ ways)
    return mean / max(1, len(two)), min(1.0, float(ways[len(one & two) :].sum()))


def _frame(runs: PairedRuns, names: Sequence[str], made: Sequence[Sequence[Stage]]) -> pd.DataFrame:
    frame = pd.DataFrame(
        dict(layer=[h.layer for h in runs.heads], head=[h.head for h in runs.heads])
    )
    for name, chain in zip(names, made, strict=True):
        first = {
            h: number for number, stage in reversed(list(enumerate(chain, 1))) for h in stage.heads
        }
        frame[name] = [first.get(h, 0) for h in runs.heads]
        for number, stage in enumerate(chain, 1):
            frame[f"{name}_effect_{number}"] = stage.found.effect
    frame["shared"] = (frame[names[0]] > 0) & (frame[names[1]] > 0)
    return frame


def _by_stage(
    names: Sequence[str], made: Sequence[Sequence[Stage]], sizes: dict[int, int]
) -> pd.DataFrame:
    rows = []
    for number, (a, b) in enumerate(zip(*made, strict=False), 1):
        shared = set(a.heads) & set(b.heads)
        expected, p = chance(a.heads, b.heads, sizes)
        rows.append(
            {
                "stage": number,
                f"{names[0]}_to": a.to,
                f"{names[1]}_to": b.to,
                names[0]: ", ".join(map(str, a.heads)),
                names[1]: ", ".join(map(str, b.heads)),
                "shared": len(shared),
                "overlap": len(shared) / max(1, len(b.heads)),
                "expected": expected,
                "p": p,
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Repair:
    """`evaluation`: accuracy before and after, paired (`difference`, `mcnemar`), a row a prompt.
    `controls`: accuracies with the rows of random heads overwritten instead, as many in each layer,
    and `p`, the share of these and of the heads' own accuracy that are as high."""

    heads: tuple[Head, ...]
    evaluation: Evaluation
    controls: np.ndarray
    p: float | None

    def __repr__(self) -> str:
        e = self.evaluation
        control = f", random heads {self.controls.mean():.3f}" if len(self.controls) else ""
        return f"Repair({e.task}: {e.baseline.mean:.3f} → {e.edited}{control}; McNemar {e.mcnemar})"


def wrong_tokens(instance: Instance) -> list[int]:
    """Where the wrong answers stand in the prompt, the last time each does. Raises `InputError`
    where none does."""
    prompt = instance.prompt
    positions = sorted(
        {max(i for i, t in enumerate(prompt) if t == w) for w in instance.wrong[0] if w in prompt}
    )
    if not positions:
        raise InputError(
            "No wrong answer stands in the prompt; say with keys= which tokens the heads are to "
            "look at."
        )
    return positions


@torch.no_grad()
@reporting("Measuring reuse")
def repair(
    model: Any,
    task: str | Task | Prompts,
    heads: str | Head | Iterable[Any],
    keys: Keys | None = None,
    weights: Sequence[float] | None = None,
    n: int = 128,
    seed: int = 0,
    *,
    edits: Sequence[Edit] = (),
    controls: int = 10,
    progress: Shown = None,
) -> Repair:
    """Makes heads look at chosen tokens from the prompt's last position: is the task done better?

    The paper's: heads that inhibit what they look at, the inhibition heads of IOI, are made to look
    at the *wrong* colours of coloured objects, half and half, and GPT-2 medium goes from 49.6 % to
    93.7 % (Merullo et al. 2024, section 5).

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        task: a name, a task with settings of its own, or `Prompts`.
        heads: whose last rows are overwritten (`interp.edits.OverwriteRow`).
        keys: prompt → positions of the tokens to look at; None for the wrong answers in the prompt
            (`wrong_tokens`).
        weights: one for each key; None for equal ones.
        n: prompts, at the seed given; of `Prompts`, all are used.
        seed: of the prompts and of the controls.
        edits: active before and after, to repair a model that they break.
        controls: sets of random heads, other than `heads`, as many in each layer.
        progress: True for a bar with the time left, or a function (done, total, what).

    Returns:
        A `Repair`: accuracy before and after, and of the controls.

    Raises:
        InputError: an answer of several tokens, no wrong answer in the prompt.
        HeadError, EditError, UnknownNameError.

    Example:
        >>> found = interp.circuits.reuse.repair(model, "ioi", "L2H3", n=4, controls=2)
        >>> found.evaluation.difference.n
        4
    """
    from interp.loading import load

    check_seed(seed)
    hooked = load(model)
    prompts = task if isinstance(task, Prompts) else from_task(hooked, task, n, seed)
    if any(len(i.ids) != len(i.prompt) for i in prompts.instances):
        raise InputError(
            f"Answers of {prompts.name} have several tokens; a repair is of the prompt's last row."
        )
    runs = PairedRuns(hooked, prompts, seed)
    targets = tuple(dict.fromkeys(check_main(runs, h) for h in parse_heads(heads)))
    if not targets:
        raise InputError("A repair needs at least one head.")
    where = [list((keys or wrong_tokens)(i)) for i in prompts.instances]
    others = _random_sets(runs, targets, controls, seed)
    plan: list[Sequence[Head]] = [(), targets, *others]

    def told(number: int) -> None:
        if progress is not None:
            progress(number, len(plan), "Repair")

    results = []
    for number, some in enumerate(plan, 1):
        results.append(_judged(hooked, prompts, some, where, weights, edits))
        told(number)
    frame = pd.DataFrame(results[0], columns=["baseline", "baseline_margin"])
    frame["edited"], frame["edited_margin"] = zip(*results[1], strict=True)
    accuracies = np.array([np.mean([c for c, _ in scores]) for scores in results[2:]])
    settings = dict(
        task=prompts.name,
        n=len(prompts),
        heads=[str(h) for h in targets],
        controls=len(others),
        weights=None if weights is None else list(weights),
        edits=edits_as_json(edits),
        backend=hooked.backend,
    )
    record = provenance(hooked, seed, settings, prompts.tensors())
    evaluation = summarise(prompts.name, "accuracy", frame, seed, record)
    p = (
        (1 + int((accuracies >= frame.edited.mean()).sum())) / (1 + len(accuracies))
        if len(accuracies)
        else None
    )
    return Repair(targets, evaluation, accuracies, p)


def _judged(
    model: HookedModel,
    prompts: Prompts,
    heads: Sequence[Head],
    where: Sequence[list[int]],
    weights: Sequence[float] | None,
    edits: Sequence[Edit],
) -> list[tuple[float, float]]:
    """(correct, margin) of each prompt with these heads' last rows overwritten."""
    scores: list[tuple[float, float]] = []
    with model.clean(), model.edit(*edits):
        for batch in batches(prompts.instances, pad_id(model.tokenizer)):
            mine = where[len(scores) : len(scores) + len(batch.instances)]
            rows = (
                [OverwriteRow(tuple(heads), mine, None if weights is None else list(weights))]
                if heads
                else []
            )
            with model.edit(*rows):
                logits = answer_logits(model, batch)
            scores += [
                prompts.task.score(x, i) for x, i in zip(logits, batch.instances, strict=True)
            ]
    return scores


def _random_sets(runs: PairedRuns, heads: Sequence[Head], n: int, seed: int) -> list[list[Head]]:
    """`n` random sets of other heads, as many in each layer as there are, or as there are
    others."""
    rng = np.random.default_rng(seed)
    free = {
        layer: [h for h in runs.heads if h.layer == layer and h not in heads]
        for layer in runs.layers
    }
    counts = {
        layer: min(len(free[layer]), sum(h.layer == layer for h in set(heads)))
        for layer in runs.layers
    }
    if sum(counts.values()) < len(set(heads)):
        return []
    return [
        [
            free[layer][i]
            for layer, k in counts.items()
            for i in rng.choice(len(free[layer]), k, replace=False)
        ]
        for _ in range(n)
    ]
