"""What the page says that serving costs is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parents[2]
#: of the measurement → of the page
LABELS = {
    "idle": "nothing",
    "gains of all heads": "gains of all heads",
    "ZeroTuning in all layers": "`ZeroTuning` in all layers",
    "entropy": "entropy",
    "all statistics": "entropy, first, off_sink, two groups, top 5",
}


def test_the_table_is_the_measurement() -> None:
    path = HERE / "kernels" / "benchmarks" / "profiles" / "serving_overhead.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    page = (HERE / "docs" / "how-to" / "serve-an-edit.md").read_text(encoding="utf-8")
    for condition, label in LABELS.items():
        own = [row for row in rows if row["condition"] == condition]
        cells = [f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in own]
        assert [(r["requests"], r["prompt"]) for r in own] == [(4, 800), (8, 14)]
        assert f"| {label} | {' | '.join(cells)} |" in page
