"""What stands before every text, and what follows: rows that begin with a BOS are other inputs.

The first token is where most heads rest their attention. The same weights therefore have other
sinks, and other scores throughout, behind a tokenizer that adds a BOS than behind one that adds
none, though their logits on the same ids agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def remark(record: Mapping[str, Any], own_tokenizer: bool) -> list[str]:
    """The sentence for a model whose library may have put the BOS there; [] for others.

    Args:
        record: the provenance of a result.
        own_tokenizer: whether the tokenizer is the library's own, and no one given by the user.
    """
    before = record.get("before_text")
    if record.get("library") != "transformer_lens" or not before or not own_tokenizer:
        return []
    return [
        f"Every text begins with {' '.join(before)}: TransformerLens makes a model's tokenizer "
        "anew with a BOS. Where the model's own adds none, the same weights loaded by transformers "
        "are measured on other inputs, and score otherwise."
    ]


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The sentence for two results that were measured on different inputs though they were asked
    the same; None where nothing says so.

    Args:
        one, other: their provenances.
    """
    mine, theirs = one.get("before_text"), other.get("before_text")
    if mine is not None and theirs is not None and mine != theirs:
        return (
            f"The two were measured on different inputs: every text begins with {_said(mine)} in "
            f"the first and with {_said(theirs)} in the second. The same weights score otherwise "
            "then; load both with one tokenizer to compare models."
        )
    keys = ("settings", "seed", "inputs_hash")
    if any(one.get(key) is None or other.get(key) is None for key in keys):
        return None
    alike = all(one[key] == other[key] for key in ("settings", "seed"))
    if alike and one["inputs_hash"] != other["inputs_hash"]:
        return (
            "The two were measured on different inputs, though with the same settings: by another "
            "tokenizer, or on another text."
        )
    return None


def _said(before: list[str]) -> str:
    return " ".join(before) or "no special token"
