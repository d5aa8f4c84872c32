"""The report: one file, nothing loaded from anywhere, walked through in a real browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest

from interp.atlas import Atlas
from interp.errors import HeadError, OutputError
from interp.results import change
from interp.results.evidence import Evidence, HeadEvidence, Partner, Passage, Writes
from interp.results.head_table import About

EVIL = "<script>alert('x')</script> & \"quoted\" </title>"
ABOUT = {
    "sink": About(
        "Attention sink",
        "Share on the first token.",
        "mean A[q, 0]",
        "Xiao et al. 2023",
        "",
        0,
        1,
        0.5,
    ),
    "entropy": About("Entropy", f"Spread. {EVIL}", EVIL, EVIL, "nats", 0, None),
    "retrieval": About("Retrieval", "Copies.", "|g ∩ k| / |k|", "Wu et al. 2024", "", 0, 1, 0.1),
}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [
            (t, "self", i, h, h)
            for t, n in (("text", 6), ("vision", 4))
            for i in range(n)
            for h in range(8)
        ],
        columns=["tower", "kind", "layer", "head", "kv_head"],
    )
    rows["sink"] = rng.random(len(rows))
    rows["sink_stderr"] = 0.01
    rows["entropy"] = rng.gamma(3, 1, len(rows))
    rows.loc[rows.tower == "vision", "entropy"] = np.nan
    rows.loc[3, "entropy"] = np.nan
    rows["retrieval"] = np.nan
    rows["not<registered>"] = rng.normal(size=len(rows))
    notes = ["retrieval: task not solved (accuracy 0.10)", EVIL]
    provenance = {
        "model": f"toy {EVIL}",
        "seed": 3,
        "settings": {"context": 1024, "samples": 16, "text": EVIL},
    }
    return Atlas(rows, provenance, notes, ABOUT)


@pytest.fixture(scope="module")
def page(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return atlas.report(tmp_path_factory.mktemp("report") / "report.html")


class Tags(HTMLParser):
    """All start tags with their attributes, and the text of style elements."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.style, self.text = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
        elif "script" not in self.open:
            self.text += data


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    found = Tags(page.read_text(encoding="utf-8"))
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\(|@import", found.style)
    assert not [t for t, _ in found.tags if t in ("link", "iframe", "img", "object", "embed")]
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'")


def test_everything_is_escaped(page: Path) -> None:
    found = Tags(page.read_text(encoding="utf-8"))
    scripts = [a for t, a in found.tags if t == "script"]
    assert len(scripts) == 2  # data, ours
    assert (
        found.text.count("alert('x')") >= 6
    )  # title, heading, note, reading, formula, citation, settings
    assert [t for t, _ in found.tags].count("h1") == 1


def test_what_it_says(page: Path) -> None:
    text = re.sub(r"\s+", " ", Tags(page.read_text(encoding="utf-8")).text)
    for part in (
        "1,024 tokens",
        "Share on the first token.",
        "mean A[q, 0]",
        "Xiao et al. 2023",
        "task not solved",
        "Not measured in any head.",
        "a head counts from 0.50",
        "Not<registered>",
        "nats",
    ):
        assert part in text, part


def test_links_lead_somewhere_and_ids_are_unique(page: Path) -> None:
    found = Tags(page.read_text(encoding="utf-8"))
    ids = [a["id"] for _, a in found.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for t, a in found.tags if t == "a" and a.get("href")}  # type: ignore[index]
    assert targets <= set(ids)


def test_an_unwritable_place_is_one_sentence(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        atlas.report(tmp_path / "file" / "report.html")


def test_a_page_of_1024_heads_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        [("", "self", i, h, h // 4) for i in range(32) for h in range(32)],
        columns=["tower", "kind", "layer", "head", "kv_head"],
    )
    for k in range(11):
        rows[f"score{k}"] = rng.normal(size=1024)
        rows[f"score{k}_stderr"] = 0.01
    word = "word "  # as many tokens as a passage has at most
    passage = Passage(
        0, 300, 20, 0.51, 13.2,
        (("…", ""), (word * 10, ""), (word, "key"), (word * 24, ""), (word, "query"),
         (word * 5, "")),
        ("one", "two", "three"),
    )  # fmt: skip
    six = tuple(word.strip() for _ in range(6))
    heads = {
        f"L{i}H{h}": HeadEvidence(
            [passage] * 5,
            [Writes(0.11, six, six, six)] * 2,
            [Partner("L17H8", k, e, 0.17, 0.13) for k in "qkv" for e in (True, False)] * 2,
        )
        for i in range(32)
        for h in range(32)
    }
    atlas = Atlas(rows, {"model": "wide"})
    atlas.evidence = Evidence(heads)
    assert len(atlas.report(tmp_path / "wide.html").read_bytes()) < 3_000_000


def test_cards_say_why(atlas: Atlas) -> None:
    about = {"sink": replace(ABOUT["sink"], role="rests on the first token")}
    named = Atlas(atlas.frame, atlas.provenance, about={**ABOUT, **about})
    frame = named.frame[named.frame.tower == "text"].reset_index(drop=True)
    for row in frame.itertuples():
        card = named.card(f"text.L{row.layer}H{row.head}")
        standing = next(s for s in card.standings if s.score == "sink")
        values = frame.sink.to_numpy()
        assert standing.value == row.sink and standing.of == len(values)
        assert standing.rank == 1 + (values > row.sink).sum()
        np.testing.assert_allclose(standing.percentile, 100 * (values < row.sink).sum() / 47)
        assert [r.name for r in card.roles] == ["rests on the first token"] * (row.sink >= 0.5)
        for role in card.roles:
            assert "counts from 0.50" in role.reason and f"of {len(values)}" in role.reason
        assert "retrieval" not in [s.score for s in card.standings]  # measured nowhere
        assert card.head in str(card) and "<table>" in card._repr_html_()
        assert repr(card).startswith(f"Card({card.head} of ") and "kv_head" not in repr(card)
    with pytest.raises(HeadError):
        named.card("text.L99H0")


def test_a_card_in_print_says_all_that_is_shown(atlas: Atlas) -> None:
    """`interp show --head` is made of the same words."""
    named = Atlas(atlas.frame, atlas.provenance, about=ABOUT)
    one = Passage(0, 3, 1, 0.5, 9.5, (("a ", ""), ("b", "key"), ("c", "query")), ("d",))
    two = replace(one, weight=0.75, moves=1.5)
    kept = HeadEvidence(
        [one, two], [Writes(0.5, ("in",), ("out",), ("low",))],
        [Partner("L0H1", "k", True, 0.17, 0.1), Partner("L0H1", "q", True, 0.07, 0.05)],
    )  # fmt: skip
    named.evidence = Evidence({"text.L1H0": kept})
    said = str(named.card("text.L1H0"))
    assert said.index("(0.75)") < said.index("(0.50)")  # by the number that is shown
    assert "50%: reads “in”, promotes “out”" in said
    assert "reads from L0H1 (K 0.17, Q 0.07)" in said  # a head once
    for standing in named.card("text.L1H0").standings:
        assert standing.title in said and standing.place in said
    assert "nats" in said


def test_ties_are_said_and_the_first_card_is_of_a_copying_head() -> None:
    from interp.report.card import cards, opening

    rows = pd.DataFrame(
        [("", "self", 0, h, h) for h in range(4)],
        columns=["tower", "kind", "layer", "head", "kv_head"],
    )
    about = {
        "sink": replace(ABOUT["sink"], role="rests on the first token"),
        "induction": replace(ABOUT["sink"], title="Induction", role="induction head"),
        "retrieval": replace(ABOUT["sink"], title="Retrieval", role="retrieval head"),
    }
    rows["sink"], rows["induction"] = [0.9, 0.9, 0.1, 0.9], [0.6, 0.1, 0.8, 0.1]
    rows["retrieval"] = [0.0, 0.0, 0.1, 0.9]
    made = cards(Atlas(rows, {"model": "m"}, about=about), None)
    (first, *_) = made["L0H0"].standings
    assert first.place == "=1 of 4" and first.tied == 3
    assert opening(made) == ("L0H3", "the strongest retrieval head")
    rows["retrieval"] = 0.1
    made = cards(Atlas(rows, {"model": "m"}, about=about), None)
    assert opening(made) == ("L0H2", "the strongest induction head")
    rows["induction"] = 0.1
    made = cards(Atlas(rows, {"model": "m"}, about=about), None)
    assert opening(made) == ("L0H0", "a head with a role")
    assert opening({}) is None


def test_where_the_weights_of_an_eye_and_of_its_model_come_from(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [("", "self", 0, 0, 0, 0.5)], columns=["tower", "kind", "layer", "head", "kv_head", "sink"]
    )
    origin = dict(
        source="bundled with interp", language_model=dict(source="PyPI: some==1", weights="Q4_1")
    )
    page = Atlas(rows, dict(model="m", origin=origin)).report(tmp_path / "r.html").read_text()
    assert "eye: bundled with interp; language model: PyPI: some==1, Q4_1" in page


def test_what_lies_between_is_kept(tmp_path: Path) -> None:
    passage = Passage(0, 3, 1, 0.5, 1.5, (("a ", ""), ("b", "key"), ("c", "query")), ("d",))
    kept = Evidence(
        {"L0H0": HeadEvidence([passage], [Writes(0.5, ("a",), ("b",), ("c",))],
                              [Partner("L1H0", "q", False, 0.2, 0.1)])},
        dict(texts=4), ["a note"],
    )  # fmt: skip
    assert Evidence.load(kept.save(tmp_path)) == kept
    (tmp_path / "evidence.json").write_text("{}")
    with pytest.raises(OutputError, match="run the scan again"):
        Evidence.load(tmp_path)


WALK = """
const card = () => document.getElementById("card").textContent.replace(/\\s+/g, " ");
const rows = () => document.getElementById("heads-body").rows;
const maps = [...document.querySelectorAll(".map canvas")];
say(maps.length);
say(maps.every((c) => c.getAttribute("aria-label").includes("highest")));
const inked = (c) => {
  const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return new Set([...Array(d.length / 4).keys()].map((i) => d.slice(4 * i, 4 * i + 3).join())).size;
};
say(maps.every((c) => inked(c) > 5));
const box = maps[0].getBoundingClientRect();
maps[0].dispatchEvent(new MouseEvent("click", {bubbles: true,
  clientX: box.left + box.width * 2.5 / 8, clientY: box.top + box.height * 3.5 / 6}));
say(card());
maps[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
say(card());
document.querySelector(".heads-table button.sort").click();
say(rows()[0].textContent);
document.querySelector(".heads-table button.sort").click();
say(rows()[0].textContent);
const filter = document.getElementById("heads-filter");
filter.value = "vision.L2";
filter.dispatchEvent(new Event("input"));
say(rows().length);
say(rows()[1].cells[0].textContent);
rows()[1].click();
say(card());
document.querySelector("#summary button").click();
say(card());
say(document.documentElement.scrollWidth <= window.innerWidth);
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_walking_through_the_page(
    atlas: Atlas, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    said = browser.run(page, WALK, tmp_path, width, dark=dark).splitlines()
    assert said[0] == "5"  # sink ×2, entropy, third-party ×2; retrieval has none
    assert said[1:3] == ["true", "true"]
    assert said[3].startswith("text.L3H2") and said[4].startswith("text.L3H3")
    own = atlas.frame.sink[atlas.frame.tower == "text"]  # the tower of the head that was clicked
    best, worst = own.idxmax(), own.idxmin()
    for line, row in ((said[5], best), (said[6], worst)):
        at = atlas.frame.loc[row]
        assert line.startswith(f"{at.tower}.L{at.layer}H{at['head']}")
    assert said[7] == "8"
    assert said[8].startswith("vision.L2H") and said[9].startswith(said[8])
    assert said[10].startswith(str(atlas.top("sink", 1)[0]))
    assert said[11] == "true"


def test_a_comparison_says_what_moved(atlas: Atlas, tmp_path: Path) -> None:
    later = Atlas(atlas.frame.copy(), {"model": "later"}, about=ABOUT)
    row = later.frame[later.frame.tower == "text"].index[10]
    later.frame.loc[row, "sink"] = atlas.frame.sink[row] + 0.75
    pairs = [("sink", "sink"), ("entropy", "entropy")]
    both = change.both(atlas, later, pairs)
    np.testing.assert_allclose(both.frame.sink_change, later.frame.sink - atlas.frame.sink)
    assert both.about("sink_change").low is None  # a signed scale around 0
    (first, *_) = change.moves(both, change.names(pairs), 5)
    at = atlas.frame.loc[row]
    assert first.head == f"text.L{at.layer}H{at['head']}" and first.score == "Attention sink"
    np.testing.assert_allclose(first.z, 0.75 / np.hypot(0.01, 0.01))
    assert len(change.moves(both, change.names(pairs), 5)) == 1  # nothing else moved
    page = atlas.report_against(tmp_path / "both.html", later).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", Tags(page).text)
    scales = {n: both.about(f"{n}_change").high for n in ("sink", "entropy")}
    assert scales["sink"] == 0.75 and scales["entropy"] is None  # of other units, and unmoved
    assert "later" in text and "p of overlap" in text
    assert "Moved most" in text and "+0.75" in text and "53.0" in text
