"""The content of a score file, of whichever format it is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp.errors import InputError, OutputError
from interp.results.interchange import catalogue
from interp.results.interchange.entries import Entries
from interp.results.interchange.file_format import FileFormat, Rows
from interp.support.files import reason
from interp.support.json_text import parse

#: what DuoAttention calls its table, and the settings beside it
TABLE, SETTINGS = "full_attention_heads.tsv", "config.json"


def read(path: Path, format: str | None = None) -> Entries:
    """The numbers of a score file.

    Args:
        path: the file, or a folder that holds DuoAttention's table.
        format: its format; None for the one that its content has.

    Raises:
        OutputError: there is no such file, or it can't be read.
        InputError: it is of no known format, or something in it is wrong.
        UnknownNameError: there is no such format.
    """
    path = path / TABLE if path.is_dir() else path
    content = _content(path)
    try:
        chosen = _format(content) if format is None else catalogue.get(format)
        if format is not None and not chosen.claims(content):
            raise InputError(f"Its content is not {chosen.what}.")
        entries = chosen.read(content)
    except InputError as error:
        raise InputError(f"{path} can't be read as scores of heads: {error}") from error
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a file of scores.") from None
    return replace(entries, said={**entries.said, **_settings(path, chosen)})


def _content(path: Path) -> Any:
    """JSON data, or `Rows` of text. Raises `OutputError` and `InputError`."""
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is no file of scores.")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise OutputError(f"There is no file of scores {path}.") from error
    except OSError as error:
        raise OutputError(f"Can't read {path} ({reason(error)}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}).") from error
    except ValueError as error:  # a null character in the path
        raise OutputError(f"Can't read {str(path)!r} ({error}).") from error
    try:
        content = parse(text, _object)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be a file of scores.") from None
    except InputError as error:
        raise InputError(f"{path} can't be read as scores of heads: {error}") from error
    except ValueError as error:
        if text.lstrip()[:1] in ("{", "["):
            raise InputError(f"{path} is not whole JSON ({error}).") from error
        return _rows(text)
    return _rows(text) if isinstance(content, int | float) else content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `InputError` for a name that is there twice, of which JSON readers keep
    the last without a word."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for n, name in enumerate(names) if name in names[:n])
        raise InputError(f"{twice[:40]!r} is there twice.")
    return dict(pairs)


def _rows(text: str) -> Rows:
    """Lines of cells between tabs or commas, or blanks where there are neither."""
    lines = [line.strip(" ") for line in text.splitlines() if line.strip()]
    return Rows(
        [
            [cell.strip() for cell in re.split(r"[\t,]", line)]
            if re.search(r"[\t,]", line)
            else line.split()
            for line in lines
        ]
    )


def _format(content: Any) -> FileFormat:
    """The format whose content this is. Raises `InputError`."""
    found = next((f for f in map(catalogue.get, catalogue.names()) if f.claims(content)), None)
    if found is not None:
        return found
    if content in ({}, []):
        raise InputError(
            "It is empty; Retrieval_Head writes such files where no sample counted (the answer "
            "never matched the needle)."
        )
    raise InputError(
        f"Its content has no known format ({', '.join(catalogue.names())}); docs/usage.md shows "
        "them."
    )


def _settings(path: Path, format: FileFormat) -> dict[str, Any]:
    """The model and sizes that DuoAttention's `config.json` names beside its table; {} where there
    is no such file, or it is another's."""
    if format.name != "duo":
        return {}
    try:
        said = parse((path.parent / SETTINGS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or not all(
        _is_size(said.get(k)) for k in ("sink_size", "recent_size")
    ):
        return {}
    sizes = {"sink_size": said["sink_size"], "recent_size": said["recent_size"]}
    model = said.get("model_name")
    return {**sizes, **({"model": model} if isinstance(model, str) else {})}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
