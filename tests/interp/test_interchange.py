"""Score files of other projects: what they hold is read exactly, and what is wrong is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.errors import HeadError, InputError, InterpError, OutputError, UnknownNameError
from interp.results.interchange import catalogue
from interp.results.places import KVHead
from interp_hooks import HookedModel
from interp_hooks.heads import Head

LAYERS, HEADS, KV_HEADS = 4, 6, 2
SHAPE = (LAYERS, HEADS, KV_HEADS)


def lists(seed: int = 0, samples: int = 5) -> dict[str, list[float]]:
    """As Retrieval_Head writes them."""
    rng = np.random.default_rng(seed)
    return {f"{n}-{h}": rng.random(samples).tolist() for n in range(LAYERS) for h in range(HEADS)}


def file(folder: Path, content: Any, name: str = "scores.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def means(content: dict[str, list[float]]) -> np.ndarray:
    return np.array([np.mean(v) for v in content.values()]).reshape(LAYERS, HEADS)


def test_retrieval_head(tmp_path: Path) -> None:
    content = lists()
    atlas = interp.Atlas.read(file(tmp_path, content), SHAPE)
    np.testing.assert_allclose(atlas["retrieval"], means(content), rtol=1e-15)
    assert atlas.about("retrieval").threshold == 0.1  # read as our score of that name
    error = atlas.stderr("retrieval")
    assert error is not None
    assert error[1, 2] == pytest.approx(np.std(content["1-2"], ddof=1) / math.sqrt(5))
    assert atlas.heads_at("L1KV1") == [Head(1, 3), Head(1, 4), Head(1, 5)]
    assert atlas.measured("retrieval").samples == 5


def test_locos_keeps_its_trials(tmp_path: Path) -> None:
    said = {"scores": lists(), "trial_ids": list("abcde"), "meta": {"model": "x"}}
    atlas = interp.Atlas.read(file(tmp_path, said))
    np.testing.assert_allclose(atlas["locos"], means(said["scores"]), rtol=1e-15)
    again = atlas.write_json(tmp_path / "again.json", "locos", format="locos")
    assert json.loads(again.read_text()) == said
    with pytest.raises(InputError, match="names 4 trials, and its heads have 5 to 5"):
        interp.Atlas.read(file(tmp_path, {**said, "trial_ids": list("abcd")}))


def duo_file(folder: Path, gates: np.ndarray, **sizes: Any) -> Path:
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    if sizes:
        file(folder, sizes, "config.json")
    return folder / "full_attention_heads.tsv"


def test_duo_attention_is_of_key_value_heads(tmp_path: Path) -> None:
    gates = np.random.default_rng(0).random((LAYERS, KV_HEADS))
    path = duo_file(tmp_path, gates, sink_size=16, recent_size=64, model_name="theirs")
    for where in (path, tmp_path):
        atlas = interp.Atlas.read(where, SHAPE)
        assert atlas.about("full_attention").grain == "kv_head"
        np.testing.assert_array_equal(atlas["full_attention"], gates.repeat(3, axis=1))
        assert atlas.provenance["interchange"]["sink_size"] == 16
    strongest = np.unravel_index(gates.argmax(), gates.shape)
    assert atlas.top("full_attention", 1) == [KVHead(*map(int, strongest))]
    assert len(atlas.ranking("full_attention")) == LAYERS * KV_HEADS
    again = atlas.write_json(tmp_path / "w.tsv", "full_attention", format="duo")
    assert again.read_text() == path.read_text()


def test_without_their_model_key_value_heads_have_no_query_heads(tmp_path: Path) -> None:
    gates = np.random.default_rng(0).random((LAYERS, KV_HEADS))
    atlas = interp.Atlas.read(duo_file(tmp_path, gates))
    assert atlas.value("L3KV1", "full_attention") == gates[3, 1]
    assert "4 layers × 2 key/value heads" in repr(atlas)
    for wrong in (
        lambda: atlas.heads_at("L3KV1"),
        lambda: atlas.value("L3H1", "full_attention"),
        lambda: atlas.head_ranking("full_attention"),
    ):
        with pytest.raises(InputError, match="read the file with model="):
            wrong()
    again = atlas.save(tmp_path / "saved")
    with pytest.raises(InputError, match="read the file with model="):
        interp.Atlas.read(again).heads_at("L3KV1")


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ({"3": [1, 5], "0": [2]}, "pasta"),
        ([[0, 2], [3, 1], [3, 5]], "pasta"),
        (["0-2", "L3H1", "3.5"], "pasta"),
    ],
)
def test_lists_of_heads(tmp_path: Path, content: Any, format: str) -> None:
    atlas = interp.Atlas.read(file(tmp_path, content), SHAPE)
    expected = np.zeros((LAYERS, HEADS))
    expected[0, 2] = expected[3, 1] = expected[3, 5] = 1
    np.testing.assert_array_equal(atlas["listed"], expected)
    again = atlas.write_json(tmp_path / "again.json", "listed", format=format)
    assert json.loads(again.read_text()) == {"0": [2], "3": [1, 5]}


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ({"3-1": 0.5, "0-2": 0.25}, 0.25),
        ([[0.5, [3, 1]], [0.25, [0, 2]]], 0.25),
        ({"3": {"1": 0.5}, "0": {"2": 0.25}}, 0.25),
        ({"3": {"1": [0.25, 0.75]}, "0": {"2": [0.5, 0.0]}}, 0.25),
        ([[[3, 1], 0.5], ["0-2", 0.25]], 0.25),
        ([{"layer": 3, "head": 1, "score": 0.5}, {"layer": 0, "head": 2, "score": 0.25}], 0.25),
    ],
)
def test_one_number_a_head(tmp_path: Path, content: Any, value: float) -> None:
    atlas = interp.Atlas.read(file(tmp_path, content), SHAPE)
    assert atlas.value("L0H2", "score") == value and atlas.value("L3H1", "score") == 0.5
    assert math.isnan(atlas.value("L0H0", "score"))  # not in the file: not measured, and not 0
    assert any("22 heads" in note for note in atlas.notes)


def test_budgets_take_their_grain_from_the_model(tmp_path: Path) -> None:
    for heads, grain in ((HEADS, "head"), (KV_HEADS, "kv_head")):
        budgets = np.arange(100, 100 + LAYERS * heads).reshape(LAYERS, heads)
        for content in (budgets.tolist(), {str(n): row for n, row in enumerate(budgets.tolist())}):
            path = file(tmp_path, content)
            atlas = interp.Atlas.read(path, SHAPE, format="matrix")
            assert atlas.scores == ["budget"] and atlas.about("budget").grain == grain
            np.testing.assert_array_equal(atlas["budget"], budgets.repeat(HEADS // heads, axis=1))
    with pytest.raises(InputError, match="2 columns, and the model 8 heads and 4 key/value"):
        interp.Atlas.read(path, (LAYERS, 8, 4), format="matrix")
    assert "does not say whether" in interp.Atlas.read(path, format="matrix").notes[0]


WRONG: dict[str, tuple[Any, str]] = {
    "a key twice": ('{"0-1": [1.0], "0-1": [2.0]}', "'0-1' is there twice"),
    "a head twice": ({"0-1": [1.0], "L0H1": [2.0]}, "Head 0-1 is there twice"),
    "a listed head twice": ([[0, 1], [0, 1]], "Head 0-1 is there twice"),
    "a layer twice": ({"0": [1], "00": [2]}, "A layer is there twice"),
    "NaN": ('{"0-1": [NaN]}', "Head 0-1 has nan"),
    "infinity": ('{"0-1": 1e999}', "Head 0-1 has inf"),
    "a word": ({"0-1": ["high"]}, "has 'high' where a number belongs"),
    "a truth": ({"0-1": True}, "has True where a number belongs"),
    "nothing": ({}, "It is empty; Retrieval_Head writes such files"),
    "no samples": ({"0-1": [], "0-2": []}, "no sample counted"),
    "no JSON": ('{"0-1": [1.0', "is not whole JSON"),
    "prose": ("the heads are as follows", "no known format"),
    "a bare number": ("7 words", "no known format"),
    "layers beyond all": ({"99999-0": [1.0]}, "No model has a layer 99999"),
    "huge numbers": ('{"0-1": [1' + "0" * 400 + "]}", "which is no score"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "ragged": ([[0.5, 0.1], [0.2]], "this one has 1 to 2"),
    "ragged gates": ("0.5\t0.1\n0.2\n", "2 lines of 1 to 2 columns"),
    "gate beyond 1": ("0.5\t1.5\n", "has 1.5; a gate is between 0 and 1"),
    "NaN gate": ("0.5\tnan\n", "key/value head 1 has nan"),
    "two numbers a head": ([{"layer": 0, "head": 1, "a": 1, "b": 2}], "a, b beside"),
    "another's keys": ({"blocks.0": [1.0]}, "no known format"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    content, match = WRONG[case]
    with pytest.raises(InputError, match=match):
        interp.Atlas.read(file(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no file of scores"):
        interp.Atlas.read(tmp_path / "gone.json")
    (tmp_path / "bytes.json").write_bytes(b'{"0-1": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        interp.Atlas.read(tmp_path / "bytes.json")
    with pytest.raises(OutputError, match="no atlas in"):
        interp.Atlas.read(tmp_path)
    with pytest.raises(UnknownNameError, match="format of score files"):
        interp.Atlas.read(file(tmp_path, lists()), format="retrieval")
    with pytest.raises(InputError, match="not LOCOS JSON"):
        interp.Atlas.read(file(tmp_path, lists()), format="locos")


@pytest.mark.parametrize("shape", [(5, 6), (4, 5), (3, 6), (4, 12), (8, 6)])
def test_a_file_of_another_model_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="is of another model"):
        interp.Atlas.read(file(tmp_path, lists()), shape)
    gates = duo_file(tmp_path, np.ones((4, 6)))
    with pytest.raises(InputError, match="is of another model"):
        interp.Atlas.read(gates, (shape[0], shape[1], shape[1]))


def test_a_file_of_the_pocket_model(pocket: HookedModel, tmp_path: Path) -> None:
    size = pocket.n_layers, pocket.n_kv_heads
    gates = np.linspace(0, 1, math.prod(size)).reshape(size)
    atlas = interp.Atlas.read(duo_file(tmp_path, gates), pocket)
    assert atlas.model == pocket.name
    group = pocket.n_heads // pocket.n_kv_heads
    np.testing.assert_array_equal(atlas["full_attention"], gates.repeat(group, axis=1))
    with pytest.raises(InputError, match="another model"):
        interp.Atlas.read(duo_file(tmp_path, np.ones((size[0], pocket.n_heads))), pocket)
    path = file(tmp_path, {f"{pocket.n_layers}": [0]})
    with pytest.raises(InputError, match="another model"):
        interp.Atlas.read(path, pocket)


numbers = st.floats(-1e300, 1e300)


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([n for n in catalogue.names() if n not in ("duo", "pasta")]),
    st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=2, max_size=4),
)
def test_round_trips_are_exact(
    tmp_path_factory: pytest.TempPathFactory, format: str, values: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    content = {f"{n}-{h}": v for n, row in enumerate(values) for h, v in enumerate(row)}
    first = interp.Atlas.read(file(folder, content), score="mine")
    path = first.write_json(folder / "out.json", "mine", format=format)
    # a table of nothing but whole numbers reads as one of budgets, as they are written
    again = interp.Atlas.read(path, score="mine", format=format)
    np.testing.assert_array_equal(again["mine"].filled(), np.array(values))


@settings(deadline=None, max_examples=12)
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        st.lists(numbers, min_size=1, max_size=4),
        min_size=1,
    ),
    st.sampled_from(["retrieval_head", "locos"]),
)
def test_samples_survive_a_round_trip_and_a_save(
    tmp_path_factory: pytest.TempPathFactory,
    samples: dict[tuple[int, int], list[float]],
    format: str,
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    content = {f"{n}-{h}": v for (n, h), v in samples.items()}
    atlas = interp.Atlas.read(file(folder, content))
    saved = interp.Atlas.load(atlas.save(folder / "saved"))
    for table in (atlas, saved):
        out = json.loads(
            table.write_json(folder / "o.json", "retrieval", format=format).read_text()
        )
        assert (out["scores"] if format == "locos" else out) == content


def test_a_score_is_chosen_by_the_format(tmp_path: Path) -> None:
    atlas = interp.Atlas.read(file(tmp_path, lists()))
    assert json.loads(atlas.write_json(tmp_path / "o.json").read_text()) == lists()
    both = interp.Atlas(atlas.frame.assign(sink=0.5), {}, (), {})
    said = json.loads(both.write_json(tmp_path / "o.json").read_text())
    assert said["0-0"] == [atlas.value("L0H0", "retrieval")]
    with pytest.raises(UnknownNameError, match="locos"):
        both.write_json(tmp_path / "o.json", format="locos")


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    scores = interp.Atlas.read(file(tmp_path, lists()), SHAPE)
    gates = interp.Atlas.read(duo_file(tmp_path, np.full((LAYERS, KV_HEADS), 0.5)), SHAPE)
    out = tmp_path / "out"
    for wrong, match in (
        (lambda: scores.write_json(out, "retrieval", format="duo"), "group="),
        (lambda: scores.write_json(out, "retrieval", format="pasta"), "with k="),
        (lambda: scores.write_json(out, "retrieval", k=3), 'format="pasta"'),
        (lambda: scores.write_json(out, "retrieval", format="pasta", k=99), "between 1 and the 24"),
        (lambda: scores.write_json(out, "retrieval", group="sum", format="duo"), "mean or max"),
        (lambda: gates.write_json(out, "full_attention"), "key/value heads"),
        (
            lambda: interp.Atlas.read(file(tmp_path, lists())).write_json(
                out, "retrieval", group="max", format="duo"
            ),
            "read the file with model=",
        ),
    ):
        with pytest.raises(InputError, match=match):
            wrong()
    assert not out.exists()
    grouped = scores.write_json(out, "retrieval", format="duo", group="max")
    expected = means(lists()).reshape(LAYERS, KV_HEADS, 3).max(2)
    np.testing.assert_allclose(np.loadtxt(grouped), expected, rtol=1e-15)


def test_heads_that_do_not_exist(tmp_path: Path) -> None:
    atlas = interp.Atlas.read(file(tmp_path, lists()), (LAYERS, HEADS))
    with pytest.raises(HeadError):
        atlas.heads_at("L0KV1")  # nothing says how many key/value heads there are
    with pytest.raises(InterpError):
        atlas.value("L9H0", "retrieval")


def test_a_format_is_one_line_in_the_registry(tmp_path: Path) -> None:
    from interp.results.interchange.entries import Entries
    from interp.results.interchange.file_format import FileFormat

    class Mine(FileFormat):
        name, what = "mine", "a format of this test"

        def claims(self, content: Any) -> bool:
            return isinstance(content, dict) and "mine" in content

        def read(self, content: Any) -> Entries:
            return Entries("mine", "mine", {(0, 0): 1.0, (0, 1): content["mine"]})

    catalogue.registry.add("mine", Mine())
    try:
        atlas = interp.Atlas.read(file(tmp_path, {"mine": 0.5}))
        assert atlas.value("L0H1", "mine") == 0.5
        with pytest.raises(InputError, match="is read and not written"):
            atlas.write_json(tmp_path / "out.json", "mine", format="mine")
    finally:
        del catalogue.registry._loaded["mine"]
