"""Where the benchmark results are that came with this version, and what stands in them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from interp.errors import OutputError
from interp.support.json_text import parse

NOT_MEASURED = "not measured"


def committed() -> Path | None:
    """Where the results are that came with this version: the checkout's, else the installed
    package's."""
    spec = find_spec("interp_kernels")  # not imported: that would load torch
    package = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if package is None:
        return None
    folders = (package.parent / "benchmarks/results", package / "results")
    return next((folder for folder in folders if (folder / "cpu.json").is_file()), None)


def read(file: Path) -> dict[str, Any]:
    """A result. Raises `OutputError` for what is none."""
    try:
        result = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"The result {file} can't be read: {error}.") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise OutputError(f"{file} is no benchmark result: it has no rows.")
    return result
