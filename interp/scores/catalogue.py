"""Scores by name. A new score is one file here and one line in this list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp.errors import InputError
from interp.support.registry import Registry
from interp_hooks.whole_numbers import quoted

if TYPE_CHECKING:
    from interp.scores.score import Score

#: what stands for several scores in a selection
GROUPS = ("default", "all")

registry: Registry[Score] = Registry(
    "score",
    "interp.scores",
    {
        "sink": "interp.scores.sink:Sink",
        "sink_rate": "interp.scores.sink_rate:SinkRate",
        "later_sink": "interp.scores.later_sink:LaterSink",
        "retrieval": "interp.scores.retrieval:Retrieval",
        "retrieval_activation": "interp.scores.retrieval_activation:RetrievalActivation",
        "retrieval_forced": "interp.scores.retrieval_forced:RetrievalForced",
        "locos": "interp.scores.locos:LOCOS",
        "qr": "interp.scores.qr:QR",
        "cri": "interp.scores.cri:CRI",
        "previous_token": "interp.scores.previous_token:PreviousToken",
        "duplicate_token": "interp.scores.duplicate_token:DuplicateToken",
        "induction": "interp.scores.induction:Induction",
        "entropy": "interp.scores.entropy:Entropy",
        "key_entropy": "interp.scores.key_entropy:KeyEntropy",
        "off_mass": "interp.scores.off_mass:OffMass",
        "gate_open": "interp.scores.gate_open:GateOpen",
        "max_prob": "interp.scores.max_prob:MaxProb",
        "distance": "interp.scores.distance:Distance",
        "local": "interp.scores.local:Local",
        "waad": "interp.scores.waad:WAAD",
        "fai": "interp.scores.fai:FAI",
        "value_drain": "interp.scores.value_drain:ValueDrain",
        "residual_peak": "interp.scores.residual_peak:ResidualPeak",
        "dormancy": "interp.scores.dormancy:Dormancy",
        "importance": "interp.scores.importance:Importance",
        "importance_gradient": "interp.scores.importance_gradient:ImportanceGradient",
        "ov_copying": "interp.scores.ov_copying:OVCopying",
        "receiver": "interp.scores.receiver:Receiver",
        "function_vector": "interp.scores.function_vector:FunctionVector",
        "in_context": "interp.scores.in_context:InContext",
        "ships": "interp.scores.ships:Ships",
        "ships_excess": "interp.scores.ships_excess:ShipsExcess",
        "successor": "interp.scores.successor:Successor",
        "copy_suppression": "interp.scores.copy_suppression:CopySuppression",
        "qk_matching": "interp.scores.qk_matching:QKMatching",
        "vhd": "interp.scores.vhd:VHD",
        "gaze": "interp.scores.gaze:Gaze",
        "image_retrieval": "interp.scores.image_retrieval:ImageRetrieval",
        "image_mass": "interp.scores.image_mass:ImageMass",
        "image_excess": "interp.scores.image_excess:ImageExcess",
        "visual_sink": "interp.scores.visual_sink:VisualSink",
        "visual_nonsink_ratio": "interp.scores.visual_nonsink_ratio:VisualNonsinkRatio",
        "image_centric": "interp.scores.image_centric:ImageCentric",
        "cls_outlier": "interp.scores.cls_outlier:CLSOutlier",
        "vit_distance": "interp.scores.vit_distance:ViTDistance",
        "vit_importance": "interp.scores.vit_importance:ViTImportance",
    },
    make=lambda cls: cls(),  # type: ignore[operator]
)


def get(name: str) -> Score:
    """The score called `name`.

    Raises:
        UnknownNameError: there is none.

    Example:
        >>> interp.scores.get("induction").title
        'Induction'
    """
    return registry.get(name)


def names() -> list[str]:
    """Names of all scores.

    Example:
        >>> "induction" in interp.scores.names()
        True
    """
    return registry.names()


def select(which: str | list[str]) -> list[Score]:
    """The scores of "default", "all", a comma-separated string or a list of names.

    Entries are read from left to right: "default" and "all" stand for their scores, a name (or
    "+name") adds one, and "-name" takes one out: "all,-importance", "default,+qr,-sink".

    Args:
        which: what is wanted.

    Raises:
        UnknownNameError: a name that is none.
        InputError: nothing stands before what is to be taken out.

    Example:
        >>> [score.name for score in interp.scores.select("sink, induction")]
        ['sink', 'induction']
        >>> "sink" in [score.name for score in interp.scores.select("default,-sink")]
        False
    """
    chosen: dict[str, Score] = {}
    for n, entry in enumerate(_entries(which)):
        if entry.startswith("-"):
            if n == 0:
                raise InputError(
                    f"{entry} takes a score out of nothing; write default,{entry} or all,{entry}."
                )
            chosen.pop(get(entry[1:].strip()).name, None)
        elif entry in GROUPS:
            every = map(get, names())
            chosen.update((s.name, s) for s in every if entry == "all" or s.default)
        else:
            score = get(entry.removeprefix("+").strip())
            chosen[score.name] = score
    return list(chosen.values())


def asked_by_name(which: str | list[str]) -> set[str]:
    """The scores of a selection that are named in it, and not only by "default" or "all".

    Example:
        >>> from interp.scores.catalogue import asked_by_name
        >>> asked_by_name("default,+qr,-sink")
        {'qr'}
    """
    entries = _entries(which)
    return {e.removeprefix("+").strip() for e in entries if e not in GROUPS and e[0] != "-"}


def _entries(which: str | list[str]) -> list[str]:
    if not isinstance(which, str | Sequence) or not all(isinstance(e, str) for e in which):
        raise InputError(
            'Scores are named like "default", "all" or ["sink", "induction"], not '
            f"{quoted(which)}; interp.scores.names() lists them."
        )
    entries = which.split(",") if isinstance(which, str) else list(which)
    return [e.strip() for e in entries if e.strip()]
