"""The picture of a circuit: what it shows is what the tables say, nothing overlaps, and a browser
draws it."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.circuits.circuit import Circuit
from interp.circuits.drawing import curve_svg, graph, graph_svg
from interp.circuits.drawing import layout as placing
from interp.circuits.drawing import picture as pictures
from interp.circuits.drawing.section import effect_heading, marked
from interp.circuits.finding import find
from interp.circuits.known.truth import Truth
from interp.errors import InputError
from interp.loading import load
from interp.results.circuit_table import EDGE_COLUMNS, Ranked, Search
from interp.support.statistics import Interval
from interp_hooks import Head

EVIL = "<script>alert('x')</script>"


def made(
    layers: int = 6,
    heads: int = 8,
    kv: int = 4,
    seed: int = 0,
    edges: int = 200,
    effect: bool = True,
    model: str = "toy",
) -> Circuit:
    """A circuit with heavy-tailed scores and random edges between all kinds of nodes."""
    rng = np.random.default_rng(seed)
    rows = [("", "self", i, h, h // (heads // kv)) for i in range(layers) for h in range(heads)]
    frame = pd.DataFrame(rows, columns=["tower", "kind", "layer", "head", "kv_head"])
    signed = rng.standard_t(2, len(frame))
    frame["eap"] = np.abs(signed)
    frame["eap_low"], frame["eap_high"] = frame["eap"] * 0.9, frame["eap"] * 1.1
    if effect:
        frame["eap_effect"] = signed
    order = ["input"]
    for i in range(layers):
        order += [*(f"L{i}H{h}" for h in range(heads)), f"MLP {i}"]
    table = []
    for _ in range(edges):
        a, b = sorted(rng.integers(0, len(order) + 1, 2))
        sender = order[min(a, len(order) - 1)]
        receiver = "output" if b == len(order) else order[b]
        kind = "qkv"[rng.integers(3)] if receiver.startswith("L") else ""
        if a == b or (
            sender[0] == receiver[0] == "L"
            and Head.parse(sender).layer == Head.parse(receiver).layer
        ):
            continue
        if kind in ("k", "v") and kv < heads:
            head = Head.parse(receiver)
            receiver = f"L{head.layer}KV{head.head // (heads // kv)}"
        table.append((sender, receiver, kind, float(rng.standard_t(2))))
    found = pd.DataFrame(table, columns=list(EDGE_COLUMNS)).drop_duplicates(
        ["sender", "receiver", "kind"]
    )
    about = Interval(0.98, 0.95, 1.0, 64)
    search = Search("ioi", "eap", 64, about, about, about, 3.0, 1.0, 12.0)
    return Circuit(frame, {"model": model, "seed": 0, "settings": {"context": 20}}, search, found)


def lines(figure: Any) -> dict[tuple[str, str, str], Any]:
    """(sender, receiver, kind) → the trace."""
    marked = [t for t in figure.data if t.meta is not None]
    found = {(t.meta["sender"], t.meta["receiver"], t.meta["kind"]): t for t in marked}
    assert len(found) == len(marked)
    return found


def spots(figure: Any) -> dict[str, tuple[float, float, float]]:
    """name → (x, y, size) of all nodes, in the axes' units and pixels."""
    found: dict[str, tuple[float, float, float]] = {}
    for trace in figure.data:
        if trace.customdata is not None:
            for name, *where in zip(
                trace.customdata, trace.x, trace.y, trace.marker.size, strict=True
            ):
                assert name not in found
                found[str(name)] = (float(where[0]), float(where[1]), float(where[2]))
    return found


def test_nodes_are_the_strongest_heads_and_what_edges_touch() -> None:
    circuit = made()
    figure = graph.figure(circuit, heads=10, edges=30)
    nodes, drawn = spots(figure), lines(figure)
    strongest = circuit.frame.nlargest(10, "eap")
    assert {n for n in nodes if re.fullmatch(r"L\d+H\d+", n)} == {
        f"L{row.layer}H{row.head}" for row in strongest.itertuples()
    }
    touched = {name for sender, receiver, _ in drawn for name in (sender, receiver)}
    others = {n for n in nodes if not re.fullmatch(r"L\d+H\d+", n)}
    assert others == {n for n in touched if not re.fullmatch(r"L\d+H\d+", n)}
    assert any(n.startswith("MLP") for n in others) and any("KV" in n for n in others)


def test_edges_are_the_strongest_between_them() -> None:
    circuit = made(edges=900)
    figure = graph.figure(circuit, heads=10, edges=30)
    nodes, drawn = spots(figure), lines(figure)
    heads = {n for n in nodes if re.fullmatch(r"L\d+H\d+", n)}
    groups = {f"L{Head.parse(n).layer}KV{Head.parse(n).head // 2}" for n in heads}
    free = {"input", "output", *(f"MLP {i}" for i in range(6)), *groups, *heads}
    table = circuit.edges[circuit.edges.sender.isin(free) & circuit.edges.receiver.isin(free)]
    wanted = table.iloc[np.argsort(-table.score.abs().to_numpy(), kind="stable")].head(30)
    assert len(wanted) == 30 and len(drawn) == 30
    widths = []
    for row in wanted.itertuples():
        trace = drawn[row.sender, row.receiver, row.kind]
        assert trace.meta["score"] == row.score and f"{row.score:.4g}" in trace.hovertemplate
        assert trace.line.color == (placing.FOR if row.score > 0 else placing.AGAINST).line
        assert trace.line.dash == {"q": "solid", "k": "dash", "v": "dot", "": "solid"}[row.kind]
        for end, at in ((row.sender, 0), (row.receiver, -1)):
            assert (trace.x[at], trace.y[at]) == pytest.approx(nodes[end][:2])
        assert nodes[row.sender][1] < nodes[row.receiver][1]  # upwards
        widths.append(trace.line.width)
    assert widths == sorted(widths, reverse=True)
    assert (widths[0], widths[-1]) == pytest.approx((pictures.THICK, pictures.THIN))


def test_size_is_score_and_colour_is_effect() -> None:
    circuit = made()
    figure = graph.figure(circuit, heads=20)
    (heads,) = [t for t in figure.data if t.name == "heads"]
    by_head = circuit.frame.set_index(["layer", "head"])
    scores = []
    for name, size, line, hover in zip(
        heads.customdata, heads.marker.size, heads.marker.line.color, heads.hovertext, strict=True
    ):
        row = by_head.loc[(Head.parse(name).layer, Head.parse(name).head)]
        scores.append((row.eap, size))
        assert line == (placing.FOR if row.eap_effect > 0 else placing.AGAINST).line
        assert ("towards the answer" if row.eap_effect > 0 else "against the answer") in hover
    assert [size for _, size in sorted(scores)] == sorted(size for _, size in scores)
    assert max(scores)[1] == pytest.approx(placing.LARGEST)
    # the area grows by the score
    areas = np.array([size**2 for _, size in scores])
    fit = np.polyfit([score for score, _ in scores], areas, 1)
    np.testing.assert_allclose(np.polyval(fit, [score for score, _ in scores]), areas, rtol=1e-6)


@pytest.mark.parametrize(
    ("layers", "heads", "kv"), [(4, 8, 4), (12, 12, 12), (32, 32, 8), (1, 64, 64), (3, 1, 1)]
)
@pytest.mark.parametrize("shown", [1, 12, 30])
def test_nothing_overlaps(layers: int, heads: int, kv: int, shown: int) -> None:
    circuit = made(layers, heads, kv, seed=layers, edges=40 * layers)
    figure = graph.figure(circuit, heads=shown)
    low, high = figure.layout.xaxis.range
    bottom, top = figure.layout.yaxis.range
    margin = figure.layout.margin
    across = (700 - margin.l - margin.r) / (high - low)  # pixels a unit where the window is narrow
    up = (figure.layout.height - margin.t - margin.b) / (top - bottom)
    nodes = spots(figure)
    for (name, a), (other, b) in combinations(nodes.items(), 2):
        if "KV" in name + other:  # these hang below their heads
            continue
        apart = np.hypot((a[0] - b[0]) * across, (a[1] - b[1]) * up)
        assert apart >= 0.88 * (a[2] + b[2]) / 2, (name, other, apart)
    for trace in lines(figure).values():
        assert low <= min(trace.x) and max(trace.x) <= high
    for name, (x, y, size) in nodes.items():
        assert (
            low * across <= x * across - size / 2 + 16
            and x * across + size / 2 - 16 <= high * across
        ), name
        assert bottom <= y <= top, name


def test_the_name_of_the_tower_is_left_out() -> None:
    plain = made()
    frame, edges = plain.frame.assign(tower="text"), plain.edges.copy()
    edges["sender"] = ["text." + s if re.fullmatch(r"L\d+H\d+", s) else s for s in edges["sender"]]
    named = Circuit(frame, plain.provenance, plain.search, edges)
    assert set(spots(graph.figure(named))) == set(spots(graph.figure(plain)))
    assert set(lines(graph.figure(named))) == set(lines(graph.figure(plain)))
    assert "text.L" in named.edges["sender"].iloc[0] + "".join(
        named.edges["sender"]
    )  # the table is left as it was


def test_a_method_without_edges_says_so() -> None:
    circuit = made(edges=0)
    figure = graph.figure(circuit)
    assert not lines(figure) and len(spots(figure)) == 12
    assert "gives no edges" in figure.layout.title.subtitle.text
    assert "strongest edges" in graph.figure(made()).layout.title.subtitle.text


def test_heads_without_a_score_are_not_shown() -> None:
    circuit = made()
    circuit.frame.loc[3:, "eap"] = 0.0
    assert set(spots(graph.figure(circuit, edges=0))) == {"L0H0", "L0H1", "L0H2"}
    circuit.frame["eap"] = 0.0
    empty = graph.figure(circuit)
    assert not spots(empty) and "no head has a score" in empty.layout.title.subtitle.text
    with pytest.raises(InputError, match="not 0 and 40"):
        graph.figure(circuit, heads=0)


def test_scores_that_have_no_sign_are_grey() -> None:
    circuit = made(effect=False)
    circuit.edges["score"] = circuit.edges["score"].abs()
    figure = graph.figure(circuit)
    assert {t.line.color for t in lines(figure).values()} == {placing.PLAIN.line}
    assert not any(t.name == "towards the answer" for t in figure.data)


@given(st.lists(st.floats(-1, 1), max_size=9).map(sorted), st.sampled_from([0.05, 0.2, 0.25]))
def test_spread_keeps_order_and_distance(wanted: list[float], apart: float) -> None:
    found = placing.spread(wanted, apart)
    assert len(found) == len(wanted)
    assert all(b - a >= apart - 1e-9 for a, b in pairwise(found))
    if found:
        assert found[0] >= -1 - 1e-9 and found[-1] <= 1 + 1e-9
    if all(b - a >= apart for a, b in pairwise(wanted)):
        assert found == pytest.approx(wanted)


def shapes(circuit: Circuit, style: str, heads: int = 12) -> dict[str, Any]:
    """What is drawn in a window of this kind."""
    every = graph_svg.drawings(circuit, heads)["drawings"]
    return next(one for one in every if one["style"] == style)


def test_pages_show_what_the_figure_shows() -> None:
    circuit = made()
    figure, pages = graph.figure(circuit), graph_svg.drawings(circuit)
    assert pages["said"] == figure.layout.title.subtitle.text
    for one in pages["drawings"]:
        told = {node["hover"].splitlines()[0] for node in one["nodes"]}
        assert told == set(spots(figure))
        assert len(one["wires"]) == len(lines(figure))
        # a line leaves its sender and ends at its receiver
        centres = {n["hover"].splitlines()[0]: (n["x"], n["y"]) for n in one["nodes"]}
        for wire in one["wires"]:
            sender, receiver = re.match(r"(.+?) → ([^,:]+)", wire["hover"]).groups()  # type: ignore[union-attr]
            numbers = [float(x) for x in re.findall(r"-?[\d.]+", wire["path"])]
            assert (numbers[0], numbers[1]) == pytest.approx(centres[sender], abs=0.11)
            assert (numbers[-2], numbers[-1]) == pytest.approx(centres[receiver], abs=0.11)
            assert numbers[1] > numbers[-1]  # upwards


@pytest.mark.parametrize("style", ["wide", "narrow"])
@pytest.mark.parametrize("shown", [1, 12, 30])
@pytest.mark.parametrize(("layers", "heads", "kv"), [(4, 8, 4), (32, 32, 8), (1, 64, 64)])
def test_nothing_overlaps_on_a_page(
    layers: int, heads: int, kv: int, shown: int, style: str
) -> None:
    one = shapes(made(layers, heads, kv, seed=layers, edges=40 * layers), style, shown)
    for a, b in combinations((n for n in one["nodes"] if not n["small"]), 2):
        apart = np.hypot(a["x"] - b["x"], a["y"] - b["y"])
        assert apart >= 0.88 * (a["radius"] + b["radius"]), (a["label"], b["label"], apart)
    for node in one["nodes"]:
        assert node["x"] - node["radius"] >= -14 and node["x"] + node["radius"] <= one["width"] + 14
        assert node["y"] - node["radius"] >= -14
        assert node["y"] + node["radius"] <= one["height"] + 14


@given(st.floats(-3, 0.5), st.floats(0.5, 4))
def test_steps_of_an_axis(low: float, high: float) -> None:
    found = curve_svg.steps(low, high)
    assert found[0] <= min(low, 0) + 1e-9 and found[-1] >= max(high, 1) - 1e-9
    assert 0.0 in found and len(found) <= curve_svg.STEPS + 2
    np.testing.assert_allclose(np.diff(found), found[1] - found[0], atol=1e-9)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    circuit = made(model=f"toy {EVIL}")
    heads = {Head(1, 1): f"name mover {EVIL}", Head(3, 2): "induction"}
    truth = Truth("ioi", heads, 6, 8, f"a paper {EVIL}", notes=(EVIL,))
    return circuit.report(tmp_path_factory.mktemp("report") / "report.html", truth)


def test_the_report_tells_the_circuit_first(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "<h1>Circuit for ioi in toy &lt;script" in text
    body = text[text.index("<main") : text.index('<script type="application/json"')]
    assert re.findall(r'<section id="([a-z-]+)', body)[:3] == ["circuit", "known", "explorer"]
    plain = re.sub(r"<[^>]+>", " ", body)
    circuit = made()
    top = circuit.edges.loc[circuit.edges.score.abs().idxmax()]
    for part in (
        "0.980 [0.950, 1.000]",
        f"{top.sender} → {top.receiver}",
        str(circuit.heads(1)[0]),
        "ROC AUC",
        "name mover",
        "3.0 forward, 1.0 backward",
        "12.0 s",
    ):
        assert part in plain, part


def test_a_plain_atlas_has_no_such_section(tmp_path: Path) -> None:
    from interp.atlas import Atlas

    circuit = made()
    text = (
        Atlas(circuit.frame, circuit.provenance)
        .report(tmp_path / "a.html")
        .read_text(encoding="utf-8")
    )
    assert (
        "<h1>toy</h1>" in text
        and 'id="circuit"' not in text
        and "<title>toy: attention heads</title>" in text
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """One of the two drawings is there, in the theme's colours, and nothing is wider than the
    window."""
    said = browser.run(
        page,
        """
        const there = [...document.querySelectorAll('.graph > svg')]
          .filter((s) => s.getBoundingClientRect().width > 0);
        say(there.length);
        say(there.map((s) => s.classList[0]).join());
        say(getComputedStyle(there[0].querySelector('g.for circle')).fill);
        say(document.documentElement.scrollWidth > innerWidth);
        """,
        tmp_path,
        width=width,
        dark=dark,
    ).splitlines()
    fill = placing.FOR.dark_fill if dark else placing.FOR.fill
    wanted = ", ".join(str(int(fill[i : i + 2], 16)) for i in (1, 3, 5))
    # headless browsers are no narrower than about 500 pixels, which is narrow as well
    assert said == ["1", "wide" if width > 704 else "narrow", f"rgb({wanted})", "false"]
    assert page.stat().st_size < 400_000  # drawn without plotly.js


def test_a_level_is_named_where_there_are_intervals() -> None:
    def of(effect: float | None, ends: tuple[float, float] | None) -> Any:
        return Ranked(Head(0, 0), 1.0, None, effect, ends)

    assert effect_heading([of(None, None)]) == ""
    assert effect_heading([of(1.0, None), of(None, None)]) == "effect"
    assert effect_heading([of(1.0, None), of(1.0, (0.5, 1.5))]) == "effect [95 %]"


def test_prompts_stand_side_by_side(tmp_path: Path) -> None:
    toy_circuit = find(load("llama"), "ioi", "attribution", n=8)
    again = Circuit.load(toy_circuit.save(tmp_path / "ioi"))
    assert again.examples == toy_circuit.examples and len(again.examples) == 6
    body = again.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for example in again.examples:
        different = {a for a, b in zip(example.clean, example.corrupted, strict=True) if a != b}
        assert different
        for piece in different:
            assert re.search(f'<mark class="query">[^<]*{re.escape(piece)}', body)


def test_a_long_prompt_is_cut_far_from_what_differs() -> None:
    tokens = [f"t{i} " for i in range(200)]
    other = [*tokens]
    other[100] = "X "
    parts = marked(tokens, other)
    assert [text for text, differs in parts if differs] == ["t100 "]
    text = "".join(text for text, _ in parts)
    assert "t80 " in text and "t79 " not in text and text.count(" … ") == 2 and "t199" in text
