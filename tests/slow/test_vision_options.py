"""The table of RITUAL+ and guidance: every row is measured against the one it names."""

from __future__ import annotations

import pytest
import torch
import vision_options as table
from test_vision_table import model as model  # the fixture

from interp.tasks.chair import Chair
from interp_hooks import HookedModel


def test_rows_are_changes_from_the_rows_they_name(
    model: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(Chair, "max_new_tokens", 6)
    result = table.measure(4, 0, model)
    rows, shown = result["rows"], table.render_table(result)
    assert set(rows) == {"greedy", *table.AGAINST}
    for label, cells in rows.items():
        for task, metric, _ in table.SHOWN.values():
            assert (cells[task][metric]["difference"] is None) == (label == "greedy")
        assert shown.count(f"| {label} |") == 1
    plus, drawn, less = (
        rows[label]["noise"]["words"]
        for label in ("RITUAL+", "RITUAL, drawn", "RITUAL+ less RITUAL, drawn")
    )
    gap = plus["edited"]["mean"] - drawn["edited"]["mean"]
    assert less["difference"]["mean"] == pytest.approx(gap)
    assert all(sum(counts.values()) == 4 for counts in result["chosen"].values())
