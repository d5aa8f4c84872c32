"""The real model of the slow tier, fetched once through the product itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import interp


@pytest.fixture(scope="session")
def smollm2_folder() -> Iterator[Path]:
    """The folder of SmolLM2-135M-Instruct, in ``INTERP_CACHE`` or a folder that stays for the next
    run. Without a network the first run fails: what the project says of it must have been seen."""
    kept = Path(tempfile.gettempdir()) / "interp-slow-tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_CACHE", os.environ.get("INTERP_CACHE") or str(kept))
        yield interp.models.get("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Any:
    """SmolLM2-135M-Instruct, tapped, on the CPU. Tests leave no edit on it."""
    return interp.load("smollm2-135m", device="cpu")
