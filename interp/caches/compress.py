"""Find which kv heads need the whole text, hold the others short, and check what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.caches.choosing import RECENT, SINK, full_heads, gate_for, gate_of
from interp.caches.compression import Compression
from interp.caches.head_cache import HeadCache
from interp.caches.snap_cache import SnapCache
from interp.edits.gate import Gate
from interp.errors import EditError, InputError
from interp.evaluation.accuracy import sample
from interp.evaluation.loss import continuation_loss, rows_for_loss
from interp.inputs.forward import forward
from interp.loading import load
from interp.results.head_table import HeadTable
from interp.scan.run import scan_heads
from interp.support.checked import whole_number
from interp.support.progress import Shown, reporting
from interp.support.provenance import provenance
from interp.support.statistics import bootstrap
from interp.tasks.answers import judge
from interp.tasks.floor import check_floor

if TYPE_CHECKING:
    from interp.tasks.task import Instance, Task
    from interp_hooks.model import HookedModel

#: random choices of as many kv heads
DRAWS = 3
#: how many of a prompt's last rows choose what SnapKV keeps, and its pooling
WINDOW, POOL = 64, 5

Make = Callable[[], Any]


@reporting("Compressing")
def compress(
    model: Any,
    budget: float = 0.5,
    *,
    context: int | None = None,
    score: str = "retrieval",
    atlas: HeadTable | None = None,
    sink: int = SINK,
    recent: int = RECENT,
    n: int = 24,
    samples: int = 16,
    seed: int = 0,
    format: str | None = None,
    force: bool = False,
    progress: Shown = None,
) -> Compression:
    """Chooses the kv heads that keep everything, and checks the choice on needles and on loss.

    The kv heads of the highest score keep all keys, the others sink + recent, so that together they
    hold `budget` of the memory at `context` tokens. Beside this choice stand, at the same memory,
    random kv heads, streaming in all kv heads (with as many recent tokens as the budget gives) and
    SnapKV, and the whole cache. Every row is measured on the same problems, through the very cache:
    the answer to a needle prompt, and the second half of a text after the first.

    Args:
        model: a loaded HuggingFace model, or anything `interp.load` takes.
        budget: share of the cache's memory.
        context: tokens of the needle prompts and of the texts; None for 1,024 or the model's limit.
        score: of a scan, which says who needs the whole text.
        atlas: a scan that has it; None for a new one of `samples` samples.
        sink, recent: what a streaming kv head holds.
        n: needle problems; half as many texts.
        samples, seed: of the scan, the problems and the draws.
        format: of the needle prompts; None for the one that the model understands best.
        force: go on where the untouched model finds no needles.
        progress: True for a bar, or a function (done, total, what).

    Returns:
        A `Compression`: the gate for `HeadCache`, and the table.

    Raises:
        InputError: an impossible budget.
        FloorError: the untouched model finds no needles.
        EditError, TapError: a model that can't hold keys head by head.

    Example:
        >>> found = interp.caches.compress(
        ...     model, 0.5, context=128, score="previous_token", atlas=atlas, recent=12, n=4
        ... )
        >>> found.frame["cache"].tolist()[:2], bool((found.frame["memory"][1:] < 0.52).all())
        (['whole', 'by previous_token'], True)
    """
    hooked = load(model)
    context = min(1024, hooked.max_context or 1024) if context is None else context
    context, n = whole_number(context, "The context"), whole_number(n, "n, the problems,")
    if n < 2:
        raise InputError("A check needs at least two problems; use n ≥ 2.")
    mains = [site for site in hooked.sites if site.is_main]
    kv_heads = {site.n_kv_heads for site in mains}
    if len(kv_heads) != 1 or len(mains) != hooked.n_layers:
        raise EditError(
            "The layers of this model differ in their attention, so one table of gates can't hold "
            "them; give a Gate by heads to HeadCache."
        )
    shape = (len(mains), kv_heads.pop())
    full = full_heads(shape[0] * shape[1], budget, context, sink, recent)
    report = progress or (lambda done, total, what: None)
    steps = (atlas is None) + 2 * (4 + DRAWS)
    if atlas is None:
        report(0, steps, "scan")
        atlas = scan_heads(
            hooked,
            scores=score,
            context=context,
            samples=samples,
            seed=seed,
            force=force,
            progress=lambda done, total, what: report(0, steps, f"scan, {what}"),
        )
    gate = gate_for(atlas, budget, context, score, sink, recent, shape[1])
    others = _others(hooked, gate, shape, budget, context, seed)
    caches: dict[str, list[Make | None]] = {
        "whole": [None],
        f"by {score}": [partial(HeadCache, hooked, gate)],
        **others,
    }

    posed, instances = sample(hooked, "niah", n, seed + 1, context, format=format)
    rows = rows_for_loss(hooked, None, None, context, max(2, n // 2), seed)
    done = steps - 2 * (4 + DRAWS)
    floor: str | None = None
    measured: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, makes in caches.items():
        found: dict[str, list[np.ndarray]] = {"needles": [], "loss": []}
        for make in makes:
            report(done, steps, f"{name}: needles")
            found["needles"].append(_needles(hooked, posed.task, instances, make))
            if make is None:
                correct = found["needles"][0].tolist()
                floor = check_floor(hooked, posed.task, instances, correct, force)
            report(done + 1, steps, f"{name}: loss")
            found["loss"].append(_loss(hooked, rows, make))
            done += 2
        measured[name] = found
    frame = _frame(hooked, caches, measured, rows, seed)
    settings = dict(
        budget=budget, context=context, score=score, sink=sink, recent=recent, n=n, full=full,
        draws=DRAWS, window=WINDOW, pool=POOL, formats=dict(posed.solved),
    )  # fmt: skip
    record = provenance(hooked, seed, settings, [instances, rows], [posed.task])
    notes = [note for note in (posed.note, floor) if note]
    return Compression(gate, frame, record, tuple(notes))


def _others(
    model: HookedModel,
    gate: Gate,
    shape: tuple[int, int],
    budget: float,
    context: int,
    seed: int,
) -> dict[str, list[Make | None]]:
    """Other caches of the same memory, by name; several of a kind are draws."""
    rng = np.random.default_rng([seed, 7])
    sizes = (gate.sink, gate.recent)
    draws = [gate_of(rng.random(shape), budget, context, *sizes) for _ in range(DRAWS)]
    size = int(budget * context)
    streaming = Gate(0.0, sink=gate.sink, recent=size - gate.sink + 1)
    found: dict[str, list[Make | None]] = {
        f"{DRAWS} random draws": [partial(HeadCache, model, one) for one in draws],
        "streaming in all": [partial(HeadCache, model, streaming)],
    }
    if size > WINDOW:
        found["SnapKV"] = [partial(SnapCache, model, size, WINDOW, POOL)]
    return found


def _needles(
    model: HookedModel, task: Task, instances: Sequence[Instance], make: Make | None
) -> np.ndarray:
    """(problems,): 1 where the answer is right, fed token by token over the cache."""
    with model.caching(make) if make else nullcontext():
        correct = [right for right, _ in judge(model, task, instances, (), stepwise=True)]
    return np.asarray(correct, float)


def _loss(model: HookedModel, rows: Sequence[Sequence[int]], make: Make | None) -> np.ndarray:
    """(texts,): mean loss of the second half of each, over the cache of the first. In chunks, which
    is as if token by token: what a row of a chunk sees is what its step would."""
    with model.caching(make) if make else nullcontext():
        return continuation_loss(model, rows, steps=False).frame["baseline"].to_numpy(float)


def _memory(model: HookedModel, makes: Sequence[Make | None], row: Sequence[int]) -> float:
    """Mean bytes that the caches hold after a text."""
    import torch

    held = []
    for make in makes:
        with model.caching(make) if make else nullcontext(), torch.no_grad():
            out = forward(model, torch.tensor([list(row)]), use_cache=True, keep=1)
        cache = out.past_key_values
        own = getattr(cache, "nbytes", None)
        if own is None:
            own = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        held.append(own)
    return float(np.mean(held))


def _frame(
    model: HookedModel,
    caches: dict[str, list[Make | None]],
    measured: dict[str, dict[str, list[np.ndarray]]],
    rows: Sequence[Sequence[int]],
    seed: int,
) -> Any:
    """The table of a `Compression`; draws of a kind are averaged problem by problem."""
    import pandas as pd

    whole = _memory(model, caches["whole"], rows[0])
    records = []
    for name, makes in caches.items():
        record: dict[str, Any] = dict(cache=name, memory=_memory(model, makes, rows[0]) / whole)
        for what, found in measured[name].items():
            values = np.mean(found, 0)
            interval = bootstrap(values.tolist(), seed)
            record |= {what: interval.mean, f"{what}_low": interval.low}
            record |= {f"{what}_high": interval.high}
            change = values - measured["whole"][what][0]
            moved = None if name == "whole" else bootstrap(change.tolist(), seed)
            for end in ("mean", "low", "high"):
                key = f"{what}_change" + ("" if end == "mean" else f"_{end}")
                record[key] = None if moved is None else getattr(moved, end)
        records.append(record)
    return pd.DataFrame(records)
