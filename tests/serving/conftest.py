"""Edits of requests are read as vLLM's entry point has them read."""

from __future__ import annotations

import pytest

from interp.serving.entry import register


@pytest.fixture(autouse=True, scope="session")
def reads_edits() -> None:
    register()
