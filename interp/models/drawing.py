"""Models of diffusers in folders, as its save_pretrained writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp.errors import ModelError
from interp.support.extras import need

#: what the weights of a folder may be called
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def draws(target: str) -> bool:
    """Whether a folder holds a model of diffusers: its config names the class and the version."""
    try:
        config = json.loads((Path(target) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"_class_name", "_diffusers_version"} <= set(config)


def read(target: str, name: str, dtype: Any) -> Any:
    """The model in a folder, on the CPU.

    Raises:
        ModelError: no such class, or weights that don't fit it or are not there.
        MissingExtraError: diffusers is not installed.
    """
    need("diffusers", extra="diffusion", what="Diffusion models")
    import diffusers

    kind = json.loads((Path(target) / "config.json").read_text(encoding="utf-8"))["_class_name"]
    known = getattr(diffusers, str(kind), None)
    if not (isinstance(known, type) and issubclass(known, diffusers.ModelMixin)):
        raise ModelError(f"{name} is a {kind}, which the diffusers installed here has not.")
    try:
        options = {} if dtype in (None, "auto") else dict(torch_dtype=dtype)
        return known.from_pretrained(target, use_safetensors=True, **options).eval()
    except Exception as error:  # its loader raises what its parts raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{name} can't be loaded: {first}") from error
