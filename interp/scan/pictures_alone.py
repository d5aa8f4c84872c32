"""What a scan of a model that reads pictures alone (a plain ViT) takes: the scores of a vision
tower, and none of a text's settings."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.scores.score import Score

if TYPE_CHECKING:
    from interp.probes.probe import ProbeBatch
    from interp_hooks.model import HookedModel


def is_of_tower(score: Score) -> bool:
    """Whether a score is of vision towers, and needs no text but what the model may read."""
    return score.needs_images and score.tower == "vision"


def of_tower(model: HookedModel, scores: Sequence[Score], named: Container[str]) -> list[Score]:
    """The scores that a model which reads pictures alone can have. Raises `InputError` for one that
    was `named` and needs text, and where none is left."""
    from interp.scores import catalogue

    every = [name for name in catalogue.names() if is_of_tower(catalogue.get(name))]
    for score in scores:
        if score.name in named and not is_of_tower(score):
            raise InputError(
                f"The score {score.name} is measured on text, and {model.name} reads pictures "
                f"alone; its scores are {', '.join(every)}."
            )
    kept = [s for s in scores if is_of_tower(s)]
    if not kept:
        raise InputError(
            f"None of these scores is of pictures alone, which are all that {model.name} reads; "
            f"its scores are {', '.join(every)}."
        )
    return kept


def refuse_text(model: HookedModel, **given: Any) -> None:
    """Raise `InputError` for settings of texts."""
    names = [name for name, value in given.items() if value is not None and value is not False]
    if names:
        raise InputError(f"{names[0]}= is about text, and {model.name} reads pictures alone.")


def check_defined(
    model: HookedModel,
    scores: Sequence[Score],
    batches: Mapping[str, Sequence[ProbeBatch]],
    notes: Sequence[str],
    named: Container[str],
) -> None:
    """Raise `InputError` for a score that was `named` and has no value in this model, and where no
    score has one. `batches`: of each probe; `notes`: of the plan, on what it can't measure."""

    def why_not(score: Score) -> str | None:
        for note in notes:
            if note.startswith(f"{score.name}: not measured. "):
                return note
        if all(score.defined(batch) for batch in batches.get(score.probe, ())):
            return None
        return f"{score.name} can't be measured in {model.name}, for {score.undefined}."

    reasons = {s.name: why_not(s) for s in scores}
    for name, reason in reasons.items():
        if reason is not None and (name in named or all(reasons.values())):
            raise InputError(reason)
