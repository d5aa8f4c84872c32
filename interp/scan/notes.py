"""What a reader must know of a scan's numbers: notes, and on how much each score was measured."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

from interp.probes import catalogue as probes
from interp.results.measured import Measured
from interp.scores.score import ModelScore, Score

if TYPE_CHECKING:
    from interp.scan.plan import Plan


def outcome_name(probe: str) -> str:
    """The name under which a probe's outcomes stand among the records of scores."""
    return f"_{probe}"


def floors(plan: Plan, records: Any, without: Container[str] = ()) -> dict[str, str]:
    """probe → why the model can't do what it asks, for those where that is so; probes `without`
    which the scan had to do are not asked about."""
    found = {}
    for name, batches in plan._batches.items():
        if name in without:
            continue
        outcomes = records[records.score == outcome_name(name)]["value"].tolist()
        failed = probes.get(name).floor(plan.model, batches, outcomes)
        if failed is not None:
            found[name] = failed
    return found


def kept(plan: Plan, records: Any, floors: Mapping[str, str]) -> Any:
    """The records without the scores of probes that the model can't do, unless that is forced."""
    if plan.settings.force or not floors:
        return records
    failed = [s.name for name in floors for s in plan._by_probe[name]]
    return records[~records.score.isin(failed)]


def notes(
    plan: Plan, records: Any, floors: Mapping[str, str], missing: Mapping[str, str] | None = None
) -> list[str]:
    """Sentences that belong beside the numbers; `missing`: score → why it was not measured."""
    found, lost = list(plan.notes), missing or {}
    if lost:
        found.append(
            f"{', '.join(lost)}: not measured, for memory ran out; run the same again with more of "
            "it to measure these alone, or take shorter inputs."
        )
    for name, batches in plan._batches.items():
        if any(s.name in lost for s in plan._by_probe.get(name, ())):
            continue
        outcomes = records[records.score == outcome_name(name)]["value"].tolist()
        failed = floors.get(name)
        if failed is None:
            found += probes.get(name).remarks(plan.model.tokenizer, batches, outcomes)
        else:
            names = ", ".join(s.name for s in plan._by_probe[name])
            how = "measured all the same (force)" if plan.settings.force else "not measured"
            found.append(f"{names}: {how}. {failed}")
    for score in (s for scores in plan._by_probe.values() for s in scores):
        if score.name in lost:
            continue
        if score.undefined and not records[records.score == score.name]["value"].notna().any():
            found.append(f"{score.name}: not measured, for {score.undefined}.")
    for score in plan.scores:
        samples = measured(plan, score, records).samples
        if samples is not None and 0 < samples < score.least_samples:
            found.append(
                f"{score.name}: {samples} sample{'' if samples == 1 else 's'}, so its values move "
                f"in steps of {1 / samples:.2g}; take at least {score.least_samples}."
            )
    context, limit = plan.settings.context, plan.model.max_context
    if plan.extrapolate and context > (limit or 0):
        found.append(f"context {context} is beyond the model's {limit} positions.")
    return found


def measured(plan: Plan, score: Score, records: Any) -> Measured:
    """On how many tokens and samples a score was measured. Nothing of a score of weights, or that
    was not measured; no tokens where it is measured on pictures."""
    mine = records[(records.score == score.name) & records["value"].notna()]
    if mine.empty:
        return Measured()
    samples = int(mine["sample"].nunique())
    if isinstance(score, ModelScore):
        if score.length is None:
            return Measured(samples=samples if score.needs_images else None)
        length = min(score.length, plan.settings.context)
        return Measured((length, length), samples)
    if score.needs_images:
        return Measured(samples=samples)
    lengths = [b.input_ids.shape[1] for b in plan._batches[score.probe]]
    lengths = [length if score.length is None else min(length, score.length) for length in lengths]
    return Measured((min(lengths), max(lengths)), samples)
