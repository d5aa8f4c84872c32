"""The files of a head table: `atlas.parquet` with the numbers, `atlas.json` with what they mean."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import InputError, OutputError
from interp.results.about import About
from interp.results.overlay import PictureOverlay
from interp.support import typed
from interp.support.files import check_writable, reason, write_atomic
from interp.support.json_text import parse

FORMAT = 1
#: what the numbers mean, written last: a table is there when this is
HEAD = "atlas.json"


def save(folder: Path, frame: pd.DataFrame, said: Mapping[str, Any]) -> Path:
    """Writes both files, see `HeadTable.save`; `said`: what stands beside the numbers."""
    check_writable(folder)
    numbers = io.BytesIO()
    frame.to_parquet(numbers, index=False)
    head = {
        "format": FORMAT,
        "frame_sha256": hashlib.sha256(numbers.getvalue()).hexdigest(),
        **said,
    }
    write_atomic(folder / "atlas.parquet", numbers.getvalue())
    write_atomic(
        folder / "atlas.json",
        (json.dumps(head, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"),
    )
    return folder


def load(
    folder: Path,
) -> tuple[pd.DataFrame, dict[str, Any], list[str], dict[str, About], list[PictureOverlay]]:
    """The arguments of the `HeadTable` that was saved, see `HeadTable.load`."""
    raw = _read(folder / "atlas.json", folder)
    try:
        head = parse(raw)
    except ValueError as error:
        raise OutputError(
            f"{folder / 'atlas.json'} is damaged ({error}); run the scan again."
        ) from error
    version = head.get("format") if isinstance(head, dict) else None
    if version != FORMAT:
        raise OutputError(
            f"{folder} holds an atlas of format {version!r} and this version reads format "
            f"{FORMAT}; run the scan again, or read it with the version of interp that wrote it."
        )
    numbers = _read(folder / "atlas.parquet", folder)
    if hashlib.sha256(numbers).hexdigest() != head.get("frame_sha256"):
        raise OutputError(
            f"{folder / 'atlas.parquet'} is not the one that atlas.json describes (damaged, or a "
            "save was interrupted); run the scan again."
        )
    try:
        names = {f.name for f in fields(About)}
        about = {
            s: typed.made(About, {k: v for k, v in a.items() if k in names})
            for s, a in head["scores"].items()
        }
        overlays = [PictureOverlay.from_json(o) for o in head.get("overlays", [])]
        return (
            pd.read_parquet(io.BytesIO(numbers)),
            typed.mapping(head["provenance"]),
            typed.texts(head["notes"]),
            about,
            overlays,
        )
    except (KeyError, TypeError, AttributeError, ValueError, OSError, InputError) as error:
        raise OutputError(f"The atlas in {folder} is damaged ({error}); run the scan again.") from (
            error
        )


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise OutputError(
            f"There is no atlas in {folder} ({path.name} is missing); `interp scan-heads --out "
            f"{folder}` makes one."
        ) from error
    except OSError as error:
        raise OutputError(f"Can't read {path} ({reason(error)}).") from error
