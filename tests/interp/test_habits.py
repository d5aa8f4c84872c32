"""What a user's hands do by habit: spellings of heads, brackets and loops over an atlas, lists of
heads, presets, texts and paths, what Jupyter shows, progress, and the sentence for a wrong type."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import interp
from interp import edits as E
from interp.errors import EditError, HeadError, InputError, InterpError, UnknownNameError
from interp.evaluation.loss import continuation_loss
from interp.results.head_table import About, HeadTable
from interp.support.progress import progress, reporting
from interp_hooks import Head, parse_heads


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model."""
    return interp.load("llama")


@pytest.mark.parametrize(
    "written",
    [
        (5, 1),
        ("L5H1",),
        ("5.1",),
        ((5, 1),),
        (Head(5, 1),),
        (np.int64(5), np.int32(1)),
        ((np.int64(5), np.int64(1)),),
        (np.array([5, 1]),),
        (torch.tensor(5), 1),
    ],
)
def test_a_head_in_every_spelling_is_the_same(written: tuple[Any, ...]) -> None:
    head = Head(*written)
    assert (head.layer, head.head, head.tower) == (5, 1, "")
    assert type(head.layer) is int and type(head.head) is int
    assert head == "L5H1" and head == "L5H1" and head == (5, 1) and head == (5, 1)
    assert hash(head) == hash((5, 1)) == hash(Head("L5H1"))
    assert str(head) == repr(head) == "L5H1" and json.dumps(str(head)) == '"L5H1"'
    assert pickle.loads(pickle.dumps(head)) == copy.deepcopy(head) == copy.copy(head) == head


def test_what_a_head_is_not_equal_to() -> None:
    head = Head("vision.L5H1")
    assert head == "vision.L5H1" and head.tower == "vision"
    assert head != (5, 1) and head != "L5H1" and head != Head(5, 1)
    assert Head(5, 1) not in ("5.1", "L5H2", [5, 1], 5, None, (5, 1, 0))


def test_heads_in_lists_sets_and_dictionaries() -> None:
    """As the docstring says: pairs are found in all of them, texts in lists."""
    heads = [Head(5, 1), Head(2, 3)]
    assert "L5H1" in heads and (2, 3) in heads and heads.index("L2H3") == 1
    assert (5, 1) in set(heads) and {Head(5, 1): 0.5}[5, 1] == 0.5 and {(5, 1): 2}[Head(5, 1)] == 2
    assert len({Head(5, 1), (5, 1)}) == 1
    assert "L5H1" not in set(heads)  # a text hashes otherwise
    assert sorted([Head(2, 0), Head(1, 3), Head(1, 2)]) == [(1, 2), (1, 3), (2, 0)]
    assert Head(1, 2) < Head(1, 3)


def test_lists_of_heads() -> None:
    assert parse_heads("L5H1, 3.2") == parse_heads(["L5H1", (3, 2)]) == [(5, 1), (3, 2)]
    assert parse_heads(np.array([[5, 1], [3, 2]])) == parse_heads(torch.tensor([[5, 1], [3, 2]]))
    assert parse_heads((5, 1)) == parse_heads((np.int64(5), np.int64(1))) == [Head(5, 1)]
    assert parse_heads(pd.Series(["L5H1", "3.2"])) == [Head(5, 1), Head(3, 2)]


@pytest.mark.parametrize(
    "wrong", [None, 3, 1.5, {"L1H1": 0}, b"L1H1", ["x"], [3, 4, 5], [None], (5, -1), Head, "L3KV1"]
)
def test_what_is_no_head_gets_a_sentence(wrong: Any) -> None:
    with pytest.raises(HeadError, match=r"L5H1|heads_at"):
        parse_heads(wrong)


@pytest.mark.parametrize("wrong", [(None,), (5,), (5.0, 1), (True, 1), (5, "1"), ("x",), (5, 1, 3)])
def test_a_head_of_wrong_types_gets_a_sentence(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(HeadError):
        Head(*wrong)


def table(**more: Any) -> HeadTable:
    """Two layers of two heads; `L0H1` is also the name of a score."""
    frame = pd.DataFrame(
        dict(
            tower="",
            kind="self",
            layer=[0, 0, 1, 1],
            head=[0, 1, 0, 1],
            kv_head=[0, 0, 0, 0],
            one=[0.1, 0.2, 0.3, 0.4],
            L0H1=[1.0, 2.0, 3.0, np.nan],
            shared=[0.5, 0.5, 0.7, 0.7],
        )
    )
    about = {"shared": About("Shared", grain="kv_head")}
    return HeadTable(frame, {"model": "tiny"}, about=about, **more)


def test_a_table_by_head() -> None:
    atlas = table()
    for spelling in ("L1H1", "1.1", (1, 1), Head(1, 1), (np.int64(1), np.int64(1))):
        row = atlas[spelling]
        assert isinstance(row, pd.Series) and row.name == "L1H1"
        assert row["one"] == 0.4 and np.isnan(row["L0H1"]) and row["shared"] == 0.7
    assert atlas["one"].shape == (2, 2)
    assert atlas["L0H1"].shape == (2, 2)  # a score of that name wins
    assert atlas.row("L0H1")["one"] == 0.2
    assert atlas["L1KV0"].to_dict() == {"shared": 0.7}


def test_loops_length_and_membership() -> None:
    atlas = table()
    assert list(atlas) == ["L0H0", "L0H1", "L1H0", "L1H1"] and len(atlas) == 4 and bool(atlas)
    assert "one" in atlas and "L1H1" in atlas and (1, 1) in atlas and Head(0, 0) in atlas
    assert "L9H9" not in atlas and "two" not in atlas and None not in atlas and 3 not in atlas
    assert [atlas[h]["one"] for h in atlas] == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("key", "error", "says"),
    [
        ("oen", UnknownNameError, "did you mean one"),
        ("L9H9", HeadError, "no head L9H9"),
        (3, UnknownNameError, 'atlas["L5H1"]'),
        (None, UnknownNameError, 'atlas["L5H1"]'),
        (("one", "two"), UnknownNameError, 'atlas["L5H1"]'),
    ],
)
def test_what_is_neither_score_nor_head(key: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as told:
        table()[key]
    assert says in str(told.value)


def test_a_head_without_a_tower_is_of_the_main_one() -> None:
    frame = pd.concat(
        [table().frame.assign(tower=t, one=v) for t, v in (("vision", 9.0), ("text", 1.0))]
    )
    atlas = HeadTable(frame, {"model": "eyes"})
    assert atlas["L0H0"]["one"] == 1.0 and atlas["vision.L0H0"]["one"] == 9.0
    assert len(atlas) == 8 and "vision.L1H1" in atlas


def test_a_list_of_heads_and_a_factor() -> None:
    by_head = E.ScaleHeads({"L1H1": 0.5, "L2H3": 0.5})
    for heads in (
        ["L1H1", (2, 3)],
        "L1H1,L2H3",
        np.array([[1, 1], [2, 3]]),
        parse_heads("1.1,2.3"),
    ):
        assert E.ScaleHeads(heads, 0.5) == by_head
    assert E.ScaleHeads("L1H1", np.float32(0.5)) == E.ScaleHeads({Head(1, 1): 0.5})
    assert E.ScaleHeads({"L1H1": 0.5}, "prefill").scope == "prefill"  # as it stood before
    assert E.from_json({"edit": "scale_heads", "gains": ["L1H1"], "factor": 0}) == [
        E.ScaleHeads(["L1H1"], 0)
    ]


def test_scaling_by_a_list_does_what_the_definition_says(model: Any) -> None:
    ids = torch.arange(8)[None]
    with model.capture_z() as own:
        model.logits(ids)
    with model.edit(E.ScaleHeads(["L1H1", (1, 2)], 3)), model.capture_z() as scaled:
        model.logits(ids)
    expected = own[1].clone()
    expected[:, :, [1, 2]] *= 3
    torch.testing.assert_close(scaled[1], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: E.ScaleHeads(["L1H1"]),
        lambda: E.ScaleHeads({"L1H1": 0}, 1),
        lambda: E.ScaleHeads(None, 1),
        lambda: E.ScaleHeads(["L1H1"], "x"),
        lambda: E.ScaleHeads(["L1H1"], [1, 2]),
        lambda: E.ScaleHeads({"L1H1": None}),
    ],
)
def test_factors_that_are_none(wrong: Callable[[], Any]) -> None:
    with pytest.raises(EditError):
        wrong()


TAKING_HEADS: list[Callable[[Any], Any]] = [
    lambda heads: E.Ablate(heads),
    lambda heads: E.ACT(heads=heads),
    lambda heads: E.ZeroTuning(2.0, heads),
    lambda heads: E.SoftPAG(0.5, heads),
    lambda heads: E.Temperature(2.0, heads),
    lambda heads: E.Streaming(heads=heads),
    lambda heads: E.ScaleTokens("initial", 2.0, heads),
    lambda heads: E.MoveMass("initial", [2], 1.0, heads),
    lambda heads: E.OverwriteRow(heads, [1]),
    lambda heads: E.PAINT([1], heads=heads),
    lambda heads: E.VHR(heads),
    lambda heads: E.VAR((1, 4), heads=heads),
    lambda heads: E.SigmoidAttention(heads=heads),
    lambda heads: E.SoftplusReweight(heads=heads),
]


@pytest.mark.parametrize("make", TAKING_HEADS)
def test_every_edit_takes_heads_alike(make: Callable[[Any], Any]) -> None:
    wanted = (Head(1, 1), Head(2, 3))
    spellings: list[Any] = [
        "L1H1,L2H3",
        ["L1H1", (2, 3)],
        [Head(1, 1), "2.3"],
        np.array([[1, 1], [2, 3]]),
        [(np.int64(1), np.int64(1)), (np.int32(2), 3)],
    ]
    for spelling in spellings:
        edit = make(spelling)
        assert edit.heads == wanted and make(edit.heads) == edit
        json.dumps(edit.to_json())
    assert make("L1H1").heads == make((1, 1)).heads == (Head(1, 1),)
    for wrong in (3, {"L1H1": 0.0}, ["x"], 1.5):
        with pytest.raises(HeadError):
            make(wrong)


def test_an_edit_takes_the_top_of_an_atlas() -> None:
    atlas = table()
    assert E.Ablate(atlas.top("one", 2)).heads == (Head(1, 1), Head(1, 0))
    assert E.Ablate(atlas).heads == tuple(atlas)
    with pytest.raises(HeadError, match="heads_at"):  # key/value heads have several heads each
        E.Ablate(atlas.top("shared", 1))


#: an edit's settings, each given what it is not
WRONG: list[Any] = [
    None, "x", 3, -1, 2.5, [1, 2], ["x"], object(), {"a": 1}, E.Ablate, torch.ones(3), np.int64(2),
    (1, "b"), True, float("nan"),
]  # fmt: skip
NEEDED: dict[str, dict[str, Any]] = {
    "scale_heads": dict(gains={"L1H1": 0.5}),
    "shift_heads": dict(directions={"L1H1": [0.5, 0.25]}),
    "rotate_heads": dict(directions={"L1H1": [0.5, 0.25]}),
    "overwrite_row": dict(heads=["L1H1"], keys=[1, 2]),
    "scale_tokens": dict(keys="initial", gain=2.0),
    "seka": dict(keys="initial", heads=["L1H1"], matrices=torch.eye(2)[None]),
    "spotlight": dict(keys="initial"),
    "move_mass": dict(donors="initial", receivers=[2]),
    "paint": dict(keys=[1]),
    "routed_heads": dict(weights=torch.zeros(4, 10, 8)),
}


@pytest.mark.parametrize("name", E.names())
def test_no_setting_of_an_edit_raises_from_inside(name: str) -> None:
    from inspect import signature

    kind = E.registry.get(name)
    for setting in signature(kind).parameters:
        for value in WRONG:
            try:
                edit = kind(**{**NEEDED.get(name, {}), setting: value})
            except InterpError as error:
                assert str(error).endswith(".") and "Traceback" not in str(error)
            else:
                repr(edit), edit.is_identity(), edit._repr_html_()


def test_numbers_of_numpy_in_edits() -> None:
    assert E.Streaming(np.int64(4), np.int64(8)) == E.Streaming(4, 8)
    assert E.Ablate("L1H1", queries=(np.int64(2), None)).queries == (2, None)
    assert E.ScaleTokens(np.array([1, 2]), 2.0) == E.ScaleTokens([1, 2], 2.0)
    assert E.Span(np.int64(2), np.int64(5)) == E.Span(2, 5)
    assert E.HeadGate(2, 0.0, layers=np.array([0, 1])).layers == (0, 1)
    for edit in (E.ACT(alpha=np.float32(5)), E.Streaming(np.int64(4), 8)):
        json.dumps(edit.to_json())


def test_presets_are_taken_alike() -> None:
    assert E.ACT(preset="code") == E.ACT.preset("code") == E.ACT(threshold=0.1)
    assert E.ACT(preset="paper") == E.ACT() == E.ACT(preset=None)
    assert E.ACT(preset="code", threshold=0.3).threshold == 0.3
    assert E.VAR((1, 4), preset=None) == E.VAR((1, 4), preset="paper") == E.VAR((1, 4))
    assert E.VAR((1, 4), preset="code").rho == 0.5
    assert E.from_json({"edit": "act", "preset": "code"}) == [E.ACT(threshold=0.1)]


def test_an_unknown_preset_is_told_with_those_there_are() -> None:
    from interp.calibration.catalogue import make

    def find(preset: Any) -> Any:
        return interp.circuits.registry.get("eap_ig").make(preset)

    for there, run in {
        "edit act has no preset {}; it has paper, code.": lambda p: E.ACT(preset=p),
        "edit var has no preset {}; it has paper, code.": lambda p: E.VAR((1, 4), preset=p),
        "method eap_ig has no preset {}; it has paper, code, activations.": find,
        "calibration method act has no preset {}; it has paper, code.": lambda p: make(
            "act", {}, p
        ),
        "calibration method gates has no preset {}; it has none.": lambda p: make("gates", {}, p),
    }.items():
        for wrong in ("book", 3):
            with pytest.raises((EditError, InputError)) as error:
                run(wrong)
            assert str(error.value) == "The " + there.format(repr(wrong))


def test_a_calibration_takes_a_preset_and_settings_on_top() -> None:
    from interp.calibration.catalogue import make

    method = make("act", dict(level=0.1), "code")
    assert (method.guard, method.threshold, method.level) == ("none", 0.1, 0.1)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="settings already"):
        make(method, {}, "code")


def test_a_text_a_path_and_a_name_are_the_same(
    model: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    written = "the cat saw the dog . the dog saw the cat . " * 8
    path = tmp_path / "notes.txt"
    path.write_text(written)
    scan = dict(context=32, samples=2, progress=False)

    def numbers(text: Any) -> list[Any]:
        return [
            interp.scan_heads(model, ["sink"], text=text, **scan)["sink"],
            interp.massive_activations(model, context=32, samples=2, text=text, least=1, ratio=1)
            .frame["value"]
            .to_numpy(),
            interp.evaluate(model, metric="loss", text=text, n=2, context=32).frame["baseline"],
            interp.rhythm(model, text)["waad"],
            model.look(text, "L0H2").frame["entropy"],
            continuation_loss(model, text).frame["baseline"],
        ]

    texts = [numbers(text) for text in (written, path, str(path), "notes.txt")]
    for other in texts[1:]:
        for one, two in zip(texts[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("wrong", ["none.txt", "./none", Path("none"), 7, b"x", ["a"], "", "  \n"])
def test_what_is_no_text_gets_a_sentence(model: Any, wrong: Any) -> None:
    for run in (
        lambda: interp.plan_scan(model, ["sink"], text=wrong),
        lambda: interp.plan_scan(model, ["retrieval"], haystack=wrong),
        lambda: interp.massive_activations(model, text=wrong),
        lambda: interp.evaluate(model, metric="loss", text=wrong),
        lambda: interp.rhythm(model, wrong),
        lambda: model.look(wrong, "L0H0"),
    ):
        with pytest.raises(InputError):
            run()


def test_a_haystack_is_a_text_or_a_path(model: Any, tmp_path: Path) -> None:
    from interp.tasks.niah import NeedleInAHaystack

    written = " ".join(f"The old dog number {i} saw the moon." for i in range(40))
    path = tmp_path / "hay.txt"
    path.write_text(written)
    tokenizer = model.tokenizer
    prompts = [
        NeedleInAHaystack(lengths=(200,), haystack=hay).sample(tokenizer, 1)[0].ids
        for hay in (written, path, str(path))
    ]
    assert prompts[0] == prompts[1] == prompts[2]
    assert tokenizer.decode(prompts[0]).count("old dog number") > 5


class Reader(HTMLParser):
    """Collects text, and holds that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.open = "", list[str]()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def read(shown: Any) -> str:
    """The text of an object's HTML, which has neither script nor colour, and is small."""
    html = shown._repr_html_()
    reader = Reader()
    reader.feed(html)
    assert not reader.open and len(html) < 20_000
    assert "<script" not in html and "color" not in html and "background" not in html
    return reader.text


def test_a_model_shows_itself(model: Any) -> None:
    text = read(model)
    count = sum(p.numel() for p in model.module.parameters())
    said = ("pocket-llama", "4 layers × 8 heads of 32", "4 key/value heads", f"{count:,}")
    more = ("float32", "cpu", "1,024 tokens", "bundled with interp")
    assert all(part in text for part in (*said, *more))
    assert model.note is not None and model.note[:20] in text


def test_a_name_is_escaped(model: Any) -> None:
    shown = model.as_face(type(model))
    shown.name = "<b>&x"
    assert "&lt;b&gt;&amp;x" in shown._repr_html_() and "<b>&x" in read(shown)


def test_a_recording_shows_itself(model: Any) -> None:
    with model.observe("entropy", "received") as seen:
        assert "nothing seen yet" in read(seen)
        model("the cat saw the dog")
    text = read(seen)
    assert "4 layers" in text and "entropy" in text and "(1, 8, 6)" in text and "received" in text
    assert "entropy (1, 8, 6)" in repr(seen) and "entropy (1, 8, 6)" in repr(seen[2])


@pytest.mark.parametrize("name", E.names())
def test_an_edit_shows_itself(name: str) -> None:
    needed = {**NEEDED, "vhr": dict(heads="L1H1")}
    text = read(E.registry.get(name)(**needed.get(name, {})))
    assert E.registry.get(name).__name__ in text and "scope" in text


@pytest.mark.parametrize("name", interp.scores.names())
def test_a_score_shows_itself(name: str) -> None:
    score = interp.scores.get(name)
    text = read(score)
    assert score.title in text and score.formula in text and name in repr(score)


def test_results_show_themselves(model: Any) -> None:
    found = interp.evaluate(model, "induction", [E.Ablate(["L2H3"])], n=4)
    assert str(found.difference) in read(found) and "pocket-llama" in read(found)
    ablated = interp.ablate(model, "L2H3", task="induction", n=4)
    assert str(ablated.ablated) in read(ablated) and str(ablated.control_heads[0]) in read(ablated)
    assert "edited" not in read(interp.evaluate(model, "induction", n=4))


def test_plans_and_massive_activations_show_themselves(model: Any) -> None:
    plan = interp.plan_scan(model, ["sink", "entropy"], context=32, samples=1)
    text = read(plan)
    assert plan.cost in text and "sink, entropy" in text and "2 scores" in repr(plan)
    table = interp.massive_activations(model, context=32, samples=2, least=3, ratio=10)
    text = read(table)
    largest = table.frame["value"].abs().max()
    assert table.rule in text and f"{largest:,.0f}" in text.replace("-", "")
    assert table.rule in repr(table)


@pytest.mark.slow
def test_a_circuit_and_a_calibration_show_themselves(model: Any) -> None:
    circuit = interp.circuits.find(model, "ioi", "head_ablation", n=4)
    text = read(circuit)
    assert "ioi" in text and all(str(h) in text for h in circuit.heads(10))
    assert circuit["L2H3"]["head_ablation"] == circuit.value("L2H3")
    found = interp.calibrate(model, "zerotuning", n=8, grid=[0.5, 2.0])
    assert str(found.heldout.accuracy.difference) in read(found)


class Display:
    """As IPython.display: what was shown and drawn again."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def HTML(self, text: str) -> str:
        return text

    def display(self, one: Any, display_id: bool = False) -> Any:
        self.shown.append(one)
        return SimpleNamespace(update=self.shown.append)


def in_a_kernel(monkeypatch: Any, kernel: Any = "kernel") -> Display:
    """As if this were a Jupyter kernel; with None, IPython in a terminal."""
    display = Display()
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=kernel), display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return display


def without_widgets(monkeypatch: Any) -> None:
    monkeypatch.setattr("interp.support.notebook.find_spec", lambda name: None)


def test_a_bar_in_a_notebook_is_drawn_in_its_place(monkeypatch: Any, capfd: Any) -> None:
    display = in_a_kernel(monkeypatch)
    without_widgets(monkeypatch)
    with progress("Scan <1>") as report:
        report(1, 2, "sink")
        report(2, 2, "done")
    first, *drawn, last = display.shown
    assert 'value="0.0000"' in first and "Scan &lt;1&gt;" in first
    assert 'value="0.5000"' in drawn[0] and "sink, 50%" in drawn[0]
    assert 'value="1.0000"' in drawn[-1] and last == ""
    assert capfd.readouterr().err == ""


def test_a_widget_where_ipywidgets_is(monkeypatch: Any) -> None:
    display = in_a_kernel(monkeypatch)

    class Widget(SimpleNamespace):
        closed = False

        def close(self) -> None:
            self.closed = True

    made = SimpleNamespace(
        FloatProgress=lambda **given: Widget(**given),
        HTML=lambda: Widget(value=""),
        HBox=lambda children: Widget(children=children),
    )
    monkeypatch.setattr("interp.support.notebook.find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "ipywidgets", made)
    with progress("Scan") as report:
        report(1, 4, "a & b")
        (box,) = display.shown
        bar, label = box.children
        assert bar.value == 0.25 and label.value == "Scan: a &amp; b, 25%" and not box.closed
    assert box.closed


def test_text_where_there_is_no_kernel(monkeypatch: Any, capfd: Any) -> None:
    display = in_a_kernel(monkeypatch, kernel=None)
    with progress("Scan") as report:
        report(1, 2, "sink")
    assert not display.shown and "Scan:  50% sink" in capfd.readouterr().err


def test_a_bar_stays_where_an_error_stopped_it(monkeypatch: Any) -> None:
    display = in_a_kernel(monkeypatch)
    without_widgets(monkeypatch)
    with pytest.raises(ValueError), progress("Scan") as report:
        report(1, 2, "sink")
        raise ValueError
    assert 'value="0.5000"' in display.shown[-1]


def test_progress_takes_true_false_or_a_function(model: Any, monkeypatch: Any) -> None:
    display = in_a_kernel(monkeypatch)
    without_widgets(monkeypatch)

    @reporting("Counting")
    def count(n: int, progress: Any = None) -> int:
        if progress is not None:
            progress(n, n, "all")
        return n

    assert count(3, True) == count(3, progress=False) == count(3) == 3
    assert "Counting: all" in display.shown[1]
    told: list[Any] = []
    count(2, progress=lambda *said: told.append(said))
    assert told == [(2, 2, "all")]
    for wrong in ("yes", 1, Display):
        with pytest.raises(InputError, match="True, False, or a function"):
            count(3, progress=wrong)
    assert interp.evaluate(model, "induction", n=2, progress=True).baseline.n == 2
