"""The table of caches of equal memory: the page shows the committed numbers, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import cache_speed
import cache_table

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "README.md").is_file())


def test_the_page_shows_the_committed_numbers() -> None:
    result = json.loads((ROOT / "examples" / "cache_table.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split(cache_table.BEGIN)[1].split(cache_table.END)[0].strip()
    assert shown == cache_table.markdown(result).strip()
    for part in result["contexts"].values():
        for budget, found in part["budgets"].items():
            rows = {row["cache"]: row for row in found["rows"]}
            assert {"whole", "by retrieval", "3 random draws", "streaming in all", "SnapKV"} == set(
                rows
            )
            for name, row in rows.items():
                assert row["memory"] <= (1 if name == "whole" else float(budget) + 0.002)


def test_the_page_has_the_times_of_a_step() -> None:
    result = json.loads((ROOT / "examples" / "cache_speed.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split(cache_speed.BEGIN)[1].split(cache_speed.END)[0].strip()
    assert shown == cache_speed.markdown(result).strip()
    assert set(result["contexts"]) == {"1024", "4096", "8192"}
    for part in result["contexts"].values():
        assert part["ratios"]["whole"] == [1.0, 1.0, 1.0]
        whole = part["megabytes"]["whole"]
        assert all(size <= whole * 1.01 for size in part["megabytes"].values())
