"""The atlas: numbers in, the same numbers out, and one clear sentence for everything that can't
be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from interp.atlas import Atlas
from interp.errors import HeadError, InputError, OutputError, UnknownNameError
from interp.results.head_table import About
from interp.support.files import check_writable, write_atomic
from interp_hooks.heads import Head

ABOUT = {
    "retrieval": About(
        "Retrieval", "How often it copies.", "|g ∩ k| / |k|", "Wu et al. 2024", "", 0.0, 1.0, 0.5
    ),
    "entropy": About("Entropy", "How spread out.", "−Σ A ln A", "", "nats", 0.0, None),
    "flat": About("Flat"),
}
PROVENANCE = {
    "model": "toy-4x3",
    "seed": 0,
    "settings": {"context": 128, "samples": 4, "folder": Path("x"), "odd": float("nan")},
    "shape": (4, np.int64(3)),
}


def frame(
    layers: int = 4, heads: int = 3, seed: int = 0, tower: str = "", kind: str = "self"
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        [(tower, kind, layer, head, head // 2) for layer in range(layers) for head in range(heads)],
        columns=["tower", "kind", "layer", "head", "kv_head"],
    )
    rows["retrieval"] = rng.random(len(rows))
    rows["retrieval_stderr"] = rng.random(len(rows)) / 100
    rows["entropy"] = rng.gamma(3, 1, len(rows))
    rows["flat"] = 1.0
    return rows


def make(**how: object) -> Atlas:
    return Atlas(frame(**how), PROVENANCE, ["retrieval: task not solved (accuracy 0.10)"], ABOUT)  # type: ignore[arg-type]


def test_scores_are_the_columns_without_their_errors() -> None:
    assert make().scores == ["retrieval", "entropy", "flat"]
    assert make().model == "toy-4x3"


def test_a_column_that_only_looks_like_an_error_is_a_score() -> None:
    rows = frame()
    rows["lonely_stderr"] = 0.5
    assert "lonely_stderr" in Atlas(rows, {}).scores


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    atlas = make()
    atlas.frame.loc[2, "retrieval"] = np.nan
    folder = atlas.save(tmp_path / "deep" / "down")
    assert sorted(p.name for p in folder.iterdir()) == ["atlas.json", "atlas.parquet"]
    again = Atlas.load(folder)
    pd.testing.assert_frame_equal(again.frame, atlas.frame)
    assert again.notes == atlas.notes
    assert again.about("retrieval") == ABOUT["retrieval"]
    assert again.provenance["settings"] == {
        "context": 128,
        "samples": 4,
        "folder": "x",
        "odd": None,
    }
    assert again.provenance["shape"] == [4, 3]


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make().save(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "atlas.json").stat().st_mode & 0o777 == 0o644


def test_saving_twice_replaces(tmp_path: Path) -> None:
    make().save(tmp_path)
    make(seed=1).save(tmp_path)
    np.testing.assert_array_equal(Atlas.load(tmp_path)["entropy"], make(seed=1)["entropy"])


def test_matrix_is_masked_where_not_measured() -> None:
    rows = frame()
    rows.loc[(rows.layer == 1) & (rows["head"] == 2), "retrieval"] = np.nan
    rows = rows[
        rows.layer != 3
    ]  # a layer without attention at the end, one head missing in layer 2
    rows = rows[~((rows.layer == 2) & (rows["head"] == 0))]
    values = Atlas(rows, {}, (), ABOUT)["retrieval"]
    assert values.shape == (3, 3)
    assert np.argwhere(np.ma.getmaskarray(values)).tolist() == [[1, 2], [2, 0]]
    assert values[0, 1] == rows.retrieval[1]


def test_top_is_strongest_first_with_ties_by_layer_and_head() -> None:
    rows = frame()
    rows["retrieval"] = 0.0
    rows.loc[(rows.layer == 2) & (rows["head"] == 1), "retrieval"] = 0.9
    rows.loc[(rows.layer == 0) & (rows["head"] == 2), "retrieval"] = np.nan
    atlas = Atlas(rows.sample(frac=1, random_state=3), {}, (), ABOUT)
    assert atlas.top("retrieval", 3) == [Head(2, 1), Head(0, 0), Head(0, 1)]
    assert len(atlas.top("retrieval", 100)) == 11
    assert atlas.top("retrieval", 0) == []


def test_value_of_a_head() -> None:
    atlas = make()
    assert atlas.value("L2H1", "entropy") == atlas["entropy"][2, 1]
    assert atlas.value(Head(2, 1), "entropy") == atlas.value((2, 1), "entropy")
    with pytest.raises(HeadError, match=r"no head L9H0 .*4 layers × 3 heads"):
        atlas.value("L9H0", "entropy")


def test_unknown_score_names_the_nearest() -> None:
    for ask in (make().__getitem__, make().top, make().plot, make().about):
        with pytest.raises(UnknownNameError, match="'retreival'; did you mean retrieval"):
            ask("retreival")


def test_threshold_count() -> None:
    atlas = make()
    assert atlas.above("retrieval") == int((atlas.frame.retrieval >= 0.5).sum())
    assert atlas.above("entropy") is None


def test_several_towers() -> None:
    vision = frame(2, 4, seed=1, tower="vision")
    vision["retrieval"] = np.nan
    atlas = Atlas(pd.concat([frame(tower="text"), vision]), PROVENANCE, (), ABOUT)
    assert atlas.towers == ["text", "vision"]
    assert atlas["retrieval"].shape == (4, 3)  # measured in one tower only
    with pytest.raises(InputError, match="text and vision; say which"):
        _ = atlas["entropy"]
    assert atlas.matrix("entropy", tower="vision").shape == (2, 4)
    assert {h.tower for h in atlas.top("entropy", 20)} == {"text", "vision"}
    assert {h.tower for h in atlas.top("entropy", 20, tower="vision")} == {"vision"}
    assert atlas.value("vision.L1H3", "entropy") == atlas.matrix("entropy", "vision")[1, 3]
    with pytest.raises(InputError, match="no tower 'audio'"):
        atlas.matrix("entropy", tower="audio")


def test_self_and_cross_attention_of_one_layer_stay_apart() -> None:
    atlas = Atlas(pd.concat([frame(), frame(seed=5, kind="cross")]), PROVENANCE, (), ABOUT)
    np.testing.assert_array_equal(atlas["entropy"], make()["entropy"])
    np.testing.assert_array_equal(atlas.matrix("entropy", kind="cross"), make(seed=5)["entropy"])
    assert len(atlas.top("entropy", 100)) == 12
    assert atlas.top("entropy", 4, kind="cross") == make(seed=5).top("entropy", 4)


def test_compare_is_spearman(tmp_path: Path) -> None:
    a, b = make(), make(seed=7)
    a.frame["retrieval"] = a.frame["retrieval"].round(1)  # ties
    a.frame.loc[3, "retrieval"] = np.nan
    table = a.compare(b).set_index("score")
    both = a.frame.retrieval.notna()
    expected = spearmanr(a.frame.retrieval[both], b.frame.retrieval[both]).statistic
    assert table.spearman["retrieval"] == pytest.approx(expected)
    assert table.heads["retrieval"] == 11
    assert 0 < table.top10_overlap["retrieval"] <= 1
    assert table.spearman["flat"] is None
    assert "the same for all heads in the first and the second" in table.remark["flat"]
    assert a.compare(a).set_index("score").spearman["entropy"] == pytest.approx(1)


def test_compare_does_not_depend_on_the_order_of_rows() -> None:
    shuffled = Atlas(frame().sample(frac=1, random_state=1), PROVENANCE, (), ABOUT)
    assert make().compare(shuffled).set_index("score").spearman["entropy"] == pytest.approx(1)


def test_compare_refuses_other_shapes_and_no_shared_score() -> None:
    with pytest.raises(InputError, match=r"4 layers × 3 heads.*5 layers × 3 heads"):
        make().compare(make(layers=5))
    other = Atlas(frame().rename(columns={"retrieval": "a", "entropy": "b", "flat": "c"}), {})
    with pytest.raises(InputError, match="share no score"):
        make().compare(other)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: f.drop(columns="layer"), "lacks the columns layer"),
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: pd.concat([f, f]), "L0H0 is twice"),
        (lambda f: f.assign(entropy="much"), "numbers"),
        (lambda f: f.assign(layer=-1), "count from 0"),
    ],
)
def test_unusable_frames(break_it, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=says):
        Atlas(break_it(frame()), {})


def test_load_says_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no atlas in"):
        Atlas.load(tmp_path)
    make().save(tmp_path)
    good = (tmp_path / "atlas.json").read_text()
    (tmp_path / "atlas.json").write_text(good[:40])
    with pytest.raises(OutputError, match="damaged"):
        Atlas.load(tmp_path)
    (tmp_path / "atlas.json").write_text(json.dumps({**json.loads(good), "format": 99}))
    with pytest.raises(OutputError, match="format 99 and this version reads format 1"):
        Atlas.load(tmp_path)
    (tmp_path / "atlas.json").write_text(
        json.dumps({k: v for k, v in json.loads(good).items() if k != "notes"})
    )
    with pytest.raises(OutputError, match="damaged"):
        Atlas.load(tmp_path)
    (tmp_path / "atlas.json").write_text(good)
    (tmp_path / "atlas.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=r"not the one that atlas.json describes"):
        Atlas.load(tmp_path)
    (tmp_path / "atlas.parquet").unlink()
    with pytest.raises(OutputError, match=r"atlas\.parquet is missing"):
        Atlas.load(tmp_path)


def test_unwritable_places(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_writable(file / "deeper")
    with pytest.raises(OutputError, match="is a file"):
        make().save(file)
    with pytest.raises(OutputError, match="Can't write"):
        write_atomic(file / "x.txt", b"")
    if Path("/proc").is_dir():  # unwritable even for root
        with pytest.raises(OutputError, match="Can't write into"):
            check_writable("/proc/interp")
    check_writable(tmp_path / "not" / "yet")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # nothing left behind


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_plot_has_layer_0_at_the_top_and_a_fixed_range() -> None:
    figure = make().plot("retrieval", top=3)
    heat = figure.data[0]
    assert (heat.zmin, heat.zmax) == (0, 1)
    low, high = figure.layout.yaxis.range
    assert low > high
    assert len(figure.layout.shapes) == 3
    assert "0.50" in figure.layout.title.subtitle.text
    assert "toy-4x3" in figure.layout.title.text


def test_plot_of_a_score_that_was_not_measured() -> None:
    rows = frame()
    rows["retrieval"] = np.nan
    figure = Atlas(rows, PROVENANCE, (), ABOUT).plot("retrieval")
    assert "not measured" in figure.layout.title.subtitle.text


def test_jupyter_and_repr() -> None:
    atlas = make()
    assert "toy-4x3" in repr(atlas)
    assert "Retrieval" in atlas._repr_html_()
    assert "<script" not in atlas._repr_html_()
