"""docs/scale.md against the script that makes its table; one of its rows is SmolLM2's."""

from __future__ import annotations

import json
from pathlib import Path

import large_scan
import scale_table


def test_the_page_is_what_the_script_makes(smollm2_folder: Path) -> None:
    page = Path("docs/scale.md").read_text(encoding="utf-8")
    table = page.split(scale_table.BEGIN)[1].split(scale_table.END)[0].strip()
    result = json.loads(Path("examples/scale_table.json").read_text())
    assert table == scale_table.markdown(result).strip()
    made = json.loads(json.dumps(scale_table.made()))
    assert made["rows"] == result["rows"]


def test_the_large_scan_is_what_was_measured() -> None:
    page = Path("docs/scale.md").read_text(encoding="utf-8")
    table = page.split(large_scan.BEGIN)[1].split(large_scan.END)[0].strip()
    result = json.loads(Path("examples/large_scan.json").read_text())
    assert table == large_scan.render(result).strip()
    assert result["parts"][0]["parameters"] > 3e9
    assert max(row["peak_gb"] for row in result["parts"]) <= large_scan.BAR_GB
