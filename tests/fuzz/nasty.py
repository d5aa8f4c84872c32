"""Strategies: what people, editors and broken disks put where something else belongs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

#: texts that break parsers, terminals and paths
TEXTS = [
    "",
    " ",
    "\x00",
    "\ufeff",
    "\ud800",
    "\udcff\udcfe",
    "é",
    "\u202e",
    "\n",
    "a\nb",
    "'",
    '"',
    "\\",
    "[red]",
    "[/]",
    "%s{}",
    "../../etc/passwd",
    "/",
    ".",
    "..",
    "~",
    "nan",
    "-1",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "a" * 5000,
    "True",
    "None",
    "L0H0",
    "L9999999999H0",
    "٣",
    "²",
    "0x10",
    "1_0",
    "--help",
    "-",
]
INTS = [0, 1, -1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, -(2**63) - 1, 10**30, 10**400]
FLOATS = [
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    1e-320,
    1e300,
    -1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
]

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12), st.characters(categories=["Cs"]))
numbers = st.one_of(st.sampled_from([*INTS, *FLOATS]), st.integers(-3, 40), st.floats(-2, 2))
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
jsons = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def dumped(value: Any) -> str:
    """JSON text, surrogates and huge integers as they are."""
    try:
        return json.dumps(value)
    except ValueError:  # an integer of too many digits for Python to print
        return '{"huge": 1' + "0" * 5000 + "}"


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one to three places replaced, taken out, doubled or wrapped."""
    for _ in range(draw(st.integers(1, 3))):
        document = _changed(draw, document, draw(st.integers(0, 4)))
    return document


def _changed(draw: st.DrawFn, value: Any, depth: int) -> Any:
    if depth and isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: _changed(draw, value[key], depth - 1)}
    if depth and isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _changed(draw, value[at], depth - 1), *value[at + 1 :]]
    kind = draw(st.sampled_from(["replace", "drop", "add", "wrap", "again"]))
    if kind == "drop" and isinstance(value, dict) and value:
        gone = draw(st.sampled_from(sorted(value)))
        return {k: v for k, v in value.items() if k != gone}
    if kind == "drop" and isinstance(value, list) and value:
        return value[1:]
    if kind == "add" and isinstance(value, dict):
        return {**value, draw(texts): draw(jsons)}
    if kind == "add" and isinstance(value, list):
        return [*value, draw(jsons)]
    if kind == "again" and isinstance(value, list):
        return value + value[:2]
    return [value] if kind == "wrap" else draw(jsons)


@st.composite
def broken(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, with some flipped, taken out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            return content
        at = draw(st.integers(0, len(content) - 1))
        many = draw(st.sampled_from([1, 2, 4, 16, 64]))
        kind = draw(st.sampled_from(["cut", "flip", "drop", "double", "put", "zero"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            flipped = bytes(b ^ draw(st.integers(1, 255)) for b in content[at : at + min(many, 4)])
            content = content[:at] + flipped + content[at + len(flipped) :]
        elif kind == "drop":
            content = content[:at] + content[at + many :]
        elif kind == "double":
            content = content[:at] + content[at : at + many] + content[at:]
        elif kind == "put":
            content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
        else:
            content = content[:at] + bytes(min(many, len(content) - at)) + content[at + many :]
    return content


@st.composite
def json_texts(draw: st.DrawFn, documents: Sequence[Any]) -> bytes:
    """A file of JSON: a mutated document, or its text with bytes broken, or something else."""
    document = draw(st.sampled_from(documents))
    kind = draw(st.sampled_from(["document", "document", "document", "bytes", "other", "odd"]))
    if kind == "other":
        return dumped(draw(jsons)).encode("utf-8", "surrogatepass")
    if kind == "odd":
        return draw(
            st.sampled_from(
                [
                    b"",
                    b"\xff\xfe",
                    b"[" * 20_000,
                    b'{"a":' * 20_000,
                    b"NaN",
                    b"-Infinity",
                    b'{"0-1": [1], "0-1": [2]}',
                    b"1" * 5000,
                    b"\xef\xbb\xbf[]",
                    "[]".encode("utf-16"),
                    b"\x00" * 64,
                ]
            )
        )
    if kind == "bytes":
        return draw(broken(dumped(document).encode()))
    return dumped(draw(mutated(document))).encode("utf-8", "surrogatepass")
