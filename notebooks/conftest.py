"""Notebooks under test find the real model where the slow tests keep it (tests/slow/conftest.py),
so that it is fetched once. Without a network their first cell fails, with its sentence: what they
say must have been seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """The cache of models, for the kernel that a notebook starts."""
    kept = Path(tempfile.gettempdir()) / "interp-slow-tests"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERP_CACHE", os.environ.get("INTERP_CACHE") or str(kept))
        return (yield)
