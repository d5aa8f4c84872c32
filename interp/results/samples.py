"""The numbers of each sample of a head table, where they are known: `samples.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import OutputError
from interp.support.files import reason, write_atomic
from interp.support.json_text import parse

FILE = "samples.json"
#: score → (layer, head or key/value head) → its number in each sample
Samples = dict[str, dict[tuple[int, int], tuple[float, ...]]]


def save(folder: Path, samples: Samples) -> None:
    """Writes them; where there are none, those of an earlier table in the folder go."""
    if not samples:
        (folder / FILE).unlink(missing_ok=True)
        return
    said = {
        score: {f"{layer}-{head}": list(values) for (layer, head), values in places.items()}
        for score, places in samples.items()
    }
    write_atomic(folder / FILE, (json.dumps(said) + "\n").encode())


def load(folder: Path, frame: pd.DataFrame) -> Samples:
    """What `save` wrote; {} where there is nothing.

    Raises:
        OutputError: it is damaged, or of another table.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        return _samples(parse(path.read_bytes()), frame)
    except OSError as error:
        raise OutputError(f"Can't read {path} ({reason(error)}).") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise OutputError(f"{path} is damaged ({error}); save the atlas again.") from error


def _samples(said: Mapping[str, Mapping[str, list[Any]]], frame: pd.DataFrame) -> Samples:
    if not set(said) <= set(frame.columns):
        raise ValueError("it is of scores that the table has not")
    found: Samples = {}
    for score, places in said.items():
        found[score] = {}
        for name, values in places.items():
            layer, head = map(int, name.split("-"))
            found[score][layer, head] = tuple(map(float, values))
    return found
