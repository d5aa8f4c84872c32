"""Edits as JSON: lists of edits to files and back, tensors in safetensors beside them."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from interp.edits.catalogue import registry
from interp.edits.head_edit import HeadEdit
from interp.edits.tensors import fetched
from interp.errors import EditError, InterpError, OutputError
from interp.support.checked import path as checked_path
from interp.support.files import write_atomic
from interp.support.json_text import parse
from interp_hooks.edit import edits_of
from interp_hooks.whole_numbers import quoted


def to_json(edits: Sequence[HeadEdit], folder: Path | None = None) -> list[dict[str, Any]]:
    """Edits as plain JSON data, in order; their tensors go to files in `folder`.

    Args:
        edits: the edits.
        folder: where tensors of more than one number are written.

    Returns:
        an object for each edit, ``{"edit": name, …fields…}``.

    Raises:
        EditError: there are tensors and no folder.

    Example:
        >>> interp.edits.to_json([interp.edits.ScaleHeads({(5, 1): 0.0})])
        [{'edit': 'scale_heads', 'gains': {'L5H1': 0.0}, 'scope': 'all', 'queries': None}]
    """
    forms = []
    for edit in edits_of(edits):
        if not isinstance(edit, HeadEdit):
            raise EditError(
                f"{quoted(edit)} has no JSON form; edits of interp.edits have, and subclasses of "
                "interp.edits.HeadEdit."
            )
        forms.append(edit.to_json(folder))
    return forms


def from_json(
    data: list[dict[str, Any]] | dict[str, Any], folder: Path | None = None
) -> list[HeadEdit]:
    """Edits from their JSON form.

    Args:
        data: an object ``{"edit": name, …fields…}``, or a list of them.
        folder: where the tensors that they name are.

    Returns:
        the edits, in order.

    Raises:
        UnknownNameError: there is no such edit.
        EditError, HeadError: settings or heads that it does not take.
        OutputError: a tensor that is not in `folder`.

    Example:
        >>> interp.edits.from_json({"edit": "soft_pag", "u": 0.5})
        [SoftPAG(u=0.5, heads=None, scope='all')]
    """
    edits = []
    entries = [data] if isinstance(data, dict) else data
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise EditError(
            'Edits in JSON are an object, or a list of objects, like {"edit": "scale_heads", …}.'
        )
    for entry in entries:
        fields = dict(entry)
        name = fields.pop("edit", None)
        if name is None:
            raise EditError(
                'An edit in JSON needs its name, like {"edit": "scale_heads", "gains": {"L5H1": '
                "0}}."
            )
        kind = registry.get(str(name))
        names = list(inspect.signature(kind).parameters)
        for key in fields:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}."
                raise EditError(f"The edit {name} has no setting {key!r}; {hint}")
        try:
            edits.append(kind.from_fields(fetched(fields, folder)))
        except InterpError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise EditError(
                f"The edit {name} does not take the settings {_short(fields)}: {error}."
            ) from error
    return edits


def _short(fields: Mapping[str, Any]) -> str:
    """Settings as JSON, not too long."""
    text = json.dumps(fields, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}…"


def save(path: str | Path, edits: Sequence[HeadEdit]) -> Path:
    """Writes edits to a JSON file that `load` and `--edit FILE.json` read.

    Tensors of more than one number go to safetensors files beside it.

    Args:
        path: the JSON file.
        edits: the edits, in order.

    Returns:
        the path.

    Raises:
        OutputError: the file can't be written.

    Example:
        >>> path = interp.edits.save("edits.json", [interp.edits.Ablate(["L2H3"])])
        >>> interp.edits.load(path)[0].heads
        (L2H3,)
    """
    path = checked_path(path, "An edit file")
    write_atomic(path, (json.dumps(to_json(edits, path.parent), indent=2) + "\n").encode())
    return path


def load(path: str | Path) -> list[HeadEdit]:
    """Edits of a JSON file, as `save` writes them.

    Args:
        path: the JSON file; tensors are read from its folder.

    Returns:
        the edits, in order.

    Raises:
        OutputError: a file that can't be read.
        EditError: not UTF-8, not JSON, or no edits; and as `from_json`.

    Example:
        >>> path = interp.edits.save("edits.json", [interp.edits.SoftPAG(0.5)])
        >>> interp.edits.load(path)
        [SoftPAG(u=0.5, heads=None, scope='all')]
    """
    path = checked_path(path, "An edit file")
    try:
        data = parse(path.read_text(encoding="utf-8-sig"))  # Windows editors put a mark in front
    except OSError as error:
        raise OutputError(f"The edit file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EditError(f"The edit file {path} is not UTF-8 text: {error}.") from error
    except json.JSONDecodeError as error:
        raise EditError(f"The edit file {path} is not JSON: {error}.") from error
    return from_json(data, Path(path).parent)
