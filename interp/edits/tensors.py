"""Tensors of edits: safetensors files beside the JSON, named by the hash of their content."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from interp.errors import EditError, OutputError
from interp.support.files import reason, write_atomic


def stored(value: Any, folder: Path | None, name: str) -> Any:
    """`value` with tensors replaced by {"tensor": file}; the file's name is the hash of its
    content."""
    if isinstance(value, dict):
        return {k: stored(v, folder, name) for k, v in value.items()}
    if isinstance(value, list):
        return [stored(v, folder, name) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    if folder is None:
        raise EditError(
            f"The edit {name} holds a tensor, which goes to a file of its own: use "
            "interp.edits.save."
        )
    from safetensors.torch import save as encode

    content = encode({"tensor": value.detach().cpu().contiguous()})
    file = f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    write_atomic(folder / file, content)
    return {"tensor": file}


def fetched(value: Any, folder: Path | None) -> Any:
    """`value` with {"tensor": file} replaced by what is in the file. Raises `EditError` or
    `OutputError`."""
    if isinstance(value, list):
        return [fetched(v, folder) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"tensor"}:
        return {k: fetched(v, folder) for k, v in value.items()}
    file = value["tensor"]
    if (
        folder is None
        or not isinstance(file, str)
        or not re.fullmatch(r"[0-9a-f]{32}\.safetensors", file)
    ):
        raise EditError(
            "A tensor of an edit is in a file beside its JSON (use interp.edits.load), not "
            f"{file!r}."
        )
    from safetensors.torch import load as decode

    try:
        content = (folder / file).read_bytes()
    except OSError as error:
        raise OutputError(
            f"The tensor {file} of an edit can't be read beside its JSON ({reason(error)})."
        ) from error
    if hashlib.sha256(content).hexdigest()[:32] != file.partition(".")[0]:
        raise EditError(
            f"The tensor file {file} is not what the edit was saved with; save the edit again."
        )
    return decode(content)["tensor"]
