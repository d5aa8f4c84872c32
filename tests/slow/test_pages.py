"""Every code block of the documentation runs as printed, page by page; those that do not are listed
with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pages
import pytest

from interp import edits

BLOCKS = {page: pages.blocks(page, text) for page, text in pages.written().items()}
SKIPPED = [b for found in BLOCKS.values() for b in found if b.title in pages.NOT_RUN]
KINDS = ("scores", "tasks", "circuits")


@pytest.mark.usefixtures("smollm2_folder")  # fetched once for the whole tier
@pytest.mark.parametrize("page", [p for p, found in BLOCKS.items() if pages.runnable(found)])
def test_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    assert not (wrong := pages.run(BLOCKS[page], tmp_path)), wrong


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_catalogue_run(kind: str, tmp_path: Path) -> None:
    """All pages of a kind in one process, so that torch is imported once."""
    made = {p: t for p, t in pages.made().items() if p.startswith(f"catalogue/{kind}/")}
    found = [b for page, text in made.items() for b in pages.blocks(page, text)]
    assert pages.runnable(found)
    assert not (wrong := pages.run(found, tmp_path)), wrong


def test_edit_files_load() -> None:
    written = [json.loads(b.text) for found in BLOCKS.values() for b in found if b.kind == "json"]
    assert written
    for data in written:
        loaded = edits.to_json(edits.from_json(data))
        assert [e["edit"] for e in loaded] == [e["edit"] for e in data]


@pytest.mark.parametrize("block", SKIPPED, ids=lambda b: f"{b.page}:{b.line}")
def test_blocks_that_do_not_run(block: pages.Block) -> None:
    """For `pytest -rs`; that they are Python at all is tested in tests/docs."""
    pytest.skip(f"{block.title}: {pages.NOT_RUN[block.title]}")
