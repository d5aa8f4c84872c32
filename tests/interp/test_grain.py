"""A score is shown at its own grain: a layer's value once, a key/value head's once a group."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.atlas import Atlas
from interp.cli.common import top_table
from interp.errors import HeadError, InputError
from interp.report.heatmap import of_score, to_outline
from interp.report.summary import counted
from interp.results.about import About
from interp.results.places import KVHead, Layer, parse
from interp_hooks.heads import Head

MEASURED = {"tokens": [1024, 1024], "samples": 16}
PROVENANCE = {
    "model": "toy",
    "measured": {
        "peak": MEASURED,
        "drain": MEASURED,
        "sink": {"tokens": [250, 1020], "samples": 1},
    },
}


def table(layers: int, kv_heads: int, group: int, seed: int = 0) -> Atlas:
    """Values drawn a place: `peak` a layer, `drain` a key/value head, `sink` a head."""
    rng = np.random.default_rng(seed)
    n_heads = kv_heads * group
    peak, drain = rng.permutation(layers) + 1.0, rng.random((layers, kv_heads))
    rows = [
        ("", "self", n, h, h // group, peak[n], drain[n, h // group], rng.random())
        for n in range(layers)
        for h in range(n_heads)
    ]
    columns = ["tower", "kind", "layer", "head", "kv_head", "peak", "drain", "sink"]
    about = {
        "peak": About("Peak", grain="layer", threshold=2.0),
        "drain": About("Drain", grain="kv_head"),
        "sink": About("Sink", threshold=0.3),
    }
    return Atlas(pd.DataFrame(rows, columns=columns), PROVENANCE, (), about)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_each_place_is_listed_once(layers: int, kv_heads: int, group: int, seed: int) -> None:
    atlas = table(layers, kv_heads, group, seed)
    for score, size in (
        ("peak", layers),
        ("drain", layers * kv_heads),
        ("sink", layers * kv_heads * group),
    ):
        ranking = atlas.ranking(score)
        places, values = [p for p, _, _ in ranking], [v for _, v, _ in ranking]
        assert len(places) == len(set(places)) == size
        assert values == sorted(values, reverse=True)
        for place, value, _ in ranking:
            heads = atlas.heads_at(place)
            assert {atlas.value(h, score) for h in heads} == {value} == {atlas.value(place, score)}
            assert atlas.heads_at(str(place)) == heads and parse(str(place)) == place
        assert sorted(h for h, _, _ in atlas.head_ranking(score)) == sorted(
            Head(n, h) for n in range(layers) for h in range(kv_heads * group)
        )
        assert atlas.matrix(score).shape == (layers, kv_heads * group)


def test_counts_count_places_and_say_on_what() -> None:
    atlas = table(4, 2, 3)
    assert atlas.above("peak") == 3  # the permutation of 1 … 4, from 2
    assert counted(atlas, "peak") == "3 ≥ 2.00 at 1,024 tokens, 16 samples"
    count = int((atlas.frame.sink >= 0.3).sum())
    assert counted(atlas, "sink") == f"{count} ≥ 0.30 at 250–1,020 tokens, 1 sample"
    assert counted(atlas, "drain") == ""
    bare = Atlas(atlas.frame, {}, (), {"peak": atlas.about("peak")})
    assert counted(bare, "peak") == "3 ≥ 2.00"  # nothing is recorded, so nothing is claimed


def test_maps_have_a_column_a_place_and_outline_what_reaches_the_threshold() -> None:
    atlas = table(4, 2, 3)
    for score, columns in (("peak", 1), ("drain", 2), ("sink", 6)):
        figure = of_score(atlas, score)
        assert np.array(figure.data[0].z).shape == (4, columns)
    peaks = of_score(atlas, "peak")
    assert "L%{y}</b>" in peaks.data[0].hovertemplate and len(peaks.layout.shapes) == 3
    assert "KV%{x}" in of_score(atlas, "drain").data[0].hovertemplate
    for layer in {int(s.y0 + 0.5) for s in peaks.layout.shapes}:
        assert atlas.value(Layer(layer), "peak") >= 2
    sinks = to_outline(atlas, "sink", 24, "", "self")
    assert all(atlas.value(p, "sink") >= 0.3 for p in sinks.places)
    assert len(sinks.places) == atlas.above("sink")
    few = to_outline(atlas, "sink", 2, "", "self")
    assert few.places == sinks.places[:2]
    assert f"strongest 2 of the {len(sinks.places)} heads" in few.text
    assert "no threshold" in to_outline(atlas, "drain", 3, "", "self").text
    low = Atlas(atlas.frame, {}, (), {"sink": About("Sink", threshold=2.0)})
    assert not of_score(low, "sink").layout.shapes


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_names_places_tokens_and_samples(width: int) -> None:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(top_table(table(4, 2, 3), width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    # a narrow terminal gives its room to heads
    assert ("tokens × samples" in text, "1,024 × 16" in text) == (width == 140, width == 140)
    assert "KV" in text
    peak = next(line for line in lines if "peak" in line)
    assert peak.count("4.00") == 1 and "H" not in peak


def test_comparison_counts_places() -> None:
    found = table(6, 2, 3).compare(table(6, 2, 3, seed=1)).set_index("score")
    assert found.heads.to_dict() == {"peak": 6, "drain": 12, "sink": 36}
    assert table(6, 2, 3).compare(table(6, 2, 3)).spearman.tolist() == pytest.approx([1, 1, 1])


def test_a_scan_knows_the_grain_and_the_samples(
    pocket: interp.HookedModel,  # type: ignore[name-defined]
    tmp_path: Path,
) -> None:
    atlas = interp.scan_heads(
        pocket, "sink_rate,value_drain,residual_peak,induction", 96, 3, progress=False
    )
    kv = pocket.n_kv_heads
    assert len(atlas.ranking("value_drain")) == pocket.n_layers * kv
    assert isinstance(atlas.top("value_drain", 1)[0], KVHead)
    assert len(atlas.top("residual_peak", 99)) == pocket.n_layers
    assert str(atlas.measured("sink_rate")) == "64 tokens, 3 samples"
    assert str(atlas.measured("value_drain")) == "96 tokens, 3 samples"
    assert str(atlas.measured("induction")) == "101 tokens, 3 samples"
    assert any(n.startswith("sink_rate: 3 samples") and "at least 8" in n for n in atlas.notes)
    again = Atlas.load(atlas.save(tmp_path))
    assert again.about("value_drain").grain == "kv_head"
    assert again.ranking("residual_peak") == atlas.ranking("residual_peak")
    page = atlas.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert '"grain":"layer"' in page and '"grain":"key/value head"' in page
    assert "3 samples" in page and "L0KV" in page


def test_what_is_no_place_is_said() -> None:
    atlas = table(2, 1, 2)
    with pytest.raises(HeadError, match="no L7 in"):
        atlas.heads_at("L7")
    with pytest.raises(InputError, match="score of heads"):
        atlas.value("L0KV0", "sink")
    with pytest.raises(InputError, match="grain"):
        About("Bad", grain="token")
    wrong: Any = atlas.top("peak", 1)
    with pytest.raises(HeadError, match="is no single query head"):
        interp.edits.ScaleHeads(dict.fromkeys(wrong, 0.0))
