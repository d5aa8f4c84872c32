"""The report: one file, nothing loaded from anywhere, and a real browser draws every figure."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from interp.atlas import Atlas
from interp.errors import OutputError
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
    assert len(scripts) == 3  # data, plotly, ours
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
        "Vision tower",
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
    plots = [a for _, a in found.tags if a.get("class") == "plot"]
    assert len(plots) == 5  # sink ×2, entropy, third-party ×2; retrieval has none
    assert all(a["role"] == "img" and "highest" in (a["aria-label"] or "") for a in plots)


def test_an_unwritable_place_is_one_sentence(atlas: Atlas, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        atlas.report(tmp_path / "file" / "report.html")


@pytest.mark.slow
def test_a_browser_draws_every_figure(page: Path, tmp_path: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next((found for found in map(shutil.which, names) if found), None)
    if browser is None:
        pytest.skip(f"no browser installed (looked for {', '.join(names)})")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=8000",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    drawn = re.split(r'(?=<div id="[^"]+" class="plot)', done.stdout)[1:]
    assert len(drawn) == 5
    for part in drawn:
        assert 'class="main-svg"' in part, part[:200]
        assert "hm" in part and "<image" in part  # the heat map itself, drawn by plotly as an image
    assert "alert('x')" in done.stdout
