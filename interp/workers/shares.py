"""Runs as they are shared out: their pieces, what is kept of them, and the progress over all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from interp.circuits.finding import Posed
from interp.circuits.methods.circuit_method import Method
from interp.circuits.methods.head_ablation import HeadAblation
from interp.circuits.runs.paired_runs import PairedRuns
from interp.errors import InputError
from interp.support.checkpoints import Checkpoints, Piece
from interp.support.progress import Progress
from interp.workers.work import AblationWork, Work, keys_of

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Share:
    """A run that is shared out: as workers are told, where its results come from, its pieces, and
    where they are kept."""

    work: Work
    record: Mapping[str, Any]
    pieces: Sequence[Piece]
    store: Checkpoints


@dataclass(frozen=True)
class Filled:
    """What is not kept in a store, by its key, and what a reader must know."""

    gathered: dict[str, Any]
    notes: list[str]


def onwards(progress: Progress | None) -> Progress | None:
    """`progress` that never goes back, for a run whose parts are told of twice."""
    if progress is None:
        return None
    furthest = 0

    def told(done: int, total: int, what: str) -> None:
        nonlocal furthest
        if done >= furthest:
            furthest = done
            progress(done, total, what)

    return told


def recipe_of(model: HookedModel) -> dict[str, Any]:
    """What workers give `interp.load`. Raises `InputError` for a model that they could not have."""
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise InputError(
            f"Workers load the model themselves, and {model.name} came as an object; load it with "
            "interp.load by its name or folder (save_pretrained makes one)."
        )
    if model.observers_and_edits()[1]:
        raise InputError(
            "Edits of a block around a run do not reach its workers; run it in one process, or "
            "bake the edits in (interp.export) and load that."
        )
    placed = recipe.get("device_map") is not None
    return recipe if placed else {**recipe, "device": model.device.type}


def milliseconds(piece: Piece) -> int:
    """As `Clock` counts a piece."""
    return max(1, round(1000 * piece.seconds))


def check_shareable(method: Method) -> None:
    """Raise `InputError` for a method whose runs are not shared out."""
    if not isinstance(method, HeadAblation):
        raise InputError(
            f"Workers share head_ablation's runs, and the method is {method.name}, which one "
            "process does: leave workers out, or take head_ablation."
        )


def ablations(search: Posed, folder: Path) -> Share:
    """A search by head ablation, a piece a head."""
    method = search.method
    assert isinstance(method, HeadAblation)
    heads = PairedRuns(search.model, search.prompts, search.record["seed"]).heads
    pieces = [Piece(key, "heads replaced", 1.0) for key in keys_of(heads, method.mode)]
    work = AblationWork(search.prompts, method, search.record["seed"])
    return Share(work, search.record, pieces, Checkpoints(folder, search.record))


def total_of(shares: Sequence[Share]) -> int:
    """Of the progress over all pieces, and a little for what follows."""
    return 1 + sum(milliseconds(piece) for share in shares for piece in share.pieces)


def last_of(progress: Progress | None, total: int) -> Progress | None:
    """`progress` of what is left to put together when all pieces are there."""
    if progress is None:
        return None
    return lambda done, of, what: progress(total if done >= of else total - 1, total, what)


@contextmanager
def scratch(folder: str | Path | None) -> Iterator[Path]:
    """A folder for pieces: the one that is given, or one for the length of a block."""
    if folder is not None:
        yield Path(folder)
        return
    with TemporaryDirectory(prefix="interp-pieces-") as made:
        yield Path(made)
