"""What the page says that statistics cost on a CPU is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]


@pytest.mark.parametrize("tokens", [2048, 4096])
def test_the_row_is_the_measurement(tokens: int) -> None:
    path = HERE / "kernels" / "benchmarks" / "profiles" / f"times_{tokens}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["tokens"] == tokens and found["threads"] == 2 and found["runs"] >= 5
    cells = [
        "{:.2f} [{:.2f}, {:.2f}]".format(*found["ratios"][label]) for label in ("cheap", "full")
    ]
    plain = f"{found['seconds']['plain']:.1f}"
    page = (HERE / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"| {tokens:,} | {plain} | {' | '.join(cells)} | {found['runs']} |" in page


def test_the_rows_of_layouts_are_the_measurement() -> None:
    path = HERE / "kernels" / "benchmarks" / "profiles" / "layouts.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    page = (HERE / "docs" / "methods.md").read_text(encoding="utf-8")
    assert found["runs"] == 5 and found["date"] in page
    names = ["HiP, 32 queries", "HiP, 64 queries", "S2"]
    names += ["HiP, 32 queries, by a mask", "S2, by a mask"]
    for row in found["rows"]:
        cells = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratios"][name]) if name in row["ratios"] else "–"
            for name in names
        ]
        start = f"| {row['keys']:,} | {row['queries']:,} | {row['milliseconds']:,.1f} | "
        assert f"{start}{' | '.join(cells)} |" in page
