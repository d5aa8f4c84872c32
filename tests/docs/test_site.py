"""The documentation site: a page for every name in the catalogues, links that lead somewhere,
pictures that say what was measured, pages that need no network."""

from __future__ import annotations

import ast
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pages
import pytest

from interp.cli.catalogue import KINDS
from interp.scores.score import Score

MADE = pages.made()

import site_catalogue  # noqa: E402  (pages.made puts the folder on the path)
import site_docstrings  # noqa: E402
import site_figures  # noqa: E402
import site_links  # noqa: E402
import site_measured  # noqa: E402
import site_notebooks  # noqa: E402
import site_reference  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_its_page(kind: str) -> None:
    for name in KINDS[kind].registry.names():
        page = MADE[f"catalogue/{kind}/{name}.md"]
        assert page.startswith("# ") and f"| name | `{name}` |" in page
        assert f"({name}.md)" in MADE[f"catalogue/{kind}/index.md"]


def test_a_new_entry_has_a_page_by_being_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Far(Score):
        """Mean distance, as a share.

        Misleads:
            In short texts <b>.
        """

        name, title, reading = "far", "Far", "How far back."
        formula, citation, probe = "mean_q Σ_k A (q − k) / T", "arXiv 2209.11895", "text"

        def measure(self, layer: Any, batch: Any) -> Any:
            raise NotImplementedError

    registry = KINDS["scores"].registry
    monkeypatch.setitem(registry._loaded, "far", Far())
    page = site_catalogue.pages()["catalogue/scores/far.md"]
    assert "mean_q Σ_k A (q − k) / T" in page and "arxiv.org/abs/2209.11895" in page
    assert "not measured on SmolLM2 yet" in page and "In short texts &lt;b>." in page


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "probes"])
def test_every_entry_says_when_it_misleads(kind: str) -> None:
    for name in KINDS[kind].registry.names():
        assert len(_misleads(kind, name)) > 40, f"{kind} {name}: its docstring has no Misleads:"
        assert "## When it misleads" in MADE[f"catalogue/{kind}/{name}.md"]


def _misleads(kind: str, name: str) -> str:
    entry = KINDS[kind].registry.get(name)
    documented = entry if hasattr(entry, "__name__") else type(entry)
    return site_docstrings.section(documented, "Misleads")


def test_sections_of_docstrings() -> None:
    def documented() -> None:
        """First line.

        Misleads:
            One
            two.

        Raises:
            Error: never.
        """

    assert site_docstrings.section(documented, "Misleads") == "One\ntwo."
    assert site_docstrings.section(documented, "Args") == ""
    left = site_docstrings.without("First.\n\nMisleads:\n    One\n\nRaises:\n    E: x.", "Misleads")
    assert left == "First.\n\nRaises:\n    E: x."


def test_links_lead_somewhere() -> None:
    if not (pages.ROOT / "pyproject.toml").is_file():
        pytest.skip("files outside docs/ are in the repository alone")
    every = {**pages.written(), **MADE, **site_reference.pages()}
    places = site_links.wanted(every)
    copies = {site_links.copy_of(p): site_links.copied_page(p) for p in places}
    every |= {path: text for path, text in copies.items() if text is not None}
    files = [str(p.relative_to(pages.DOCS)) for p in pages.DOCS.rglob("*") if p.is_file()]
    assert len(places) > 5
    assert site_links.broken(every, [*files, *copies]) == []


def test_broken_links_are_found() -> None:
    linked = {"a.md": "[x](b.md#here) [y](b.md#there) [z](c.md) `[q](d.md)`", "b.md": "## Here"}
    assert site_links.broken(linked, []) == ["a.md: b.md#there", "a.md: c.md"]
    assert site_links.outside("how-to/a.md", "../../examples/act.py") == "examples/act.py"
    turned = site_links.kept_inside("how-to/a.md", "[x](../../examples/act.py)")
    assert turned == "[x](../files/examples/act.py.code.md)"


def test_a_notebook_is_a_page(tmp_path: Path) -> None:
    png = {"data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}}
    code = {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"text": ["2\n"]}, png]}
    cells = [{"cell_type": "markdown", "source": ["# A question\n", "More."]}, code]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    page = site_notebooks.page(tmp_path / "a.ipynb")
    assert page.startswith("# A question\n\nThe notebook `notebooks/a.ipynb`")
    assert "More.\n\n````python\n1 + 1\n````\n\n````text\n2\n````" in page
    assert 'src="data:image/png;base64,QUJD"' in page and "<Figure>" not in page


def test_titles_of_blocks_are_known() -> None:
    """And another library's code is Python, though it does not run here."""
    known = {*pages.RUNS_ON, *pages.NOT_RUN}
    for page, text in {**pages.written(), **MADE}.items():
        for block in pages.blocks(page, text):
            assert block.title in known, f"{page}:{block.line}"
            if block.kind == "python":
                ast.parse(block.text)


def test_heat_map_shows_every_head() -> None:
    svg = site_figures.heat_map([[0.0, 0.5], [1.0, None]], "a <score>", (0.0, 1.0), threshold=0.5)
    root = ET.fromstring(svg)
    cells = {rect[0].text: (rect.get("fill"), rect.get("class")) for rect in root if len(rect)}
    at = {rect[0].text: (float(rect.get("x")), float(rect.get("y"))) for rect in root if len(rect)}
    assert at["L1H0 1.00"][1] > at["L0H0 0.00"][1] and at["L0H1 0.50"][0] > at["L0H0 0.00"][0]
    assert cells == {
        "L0H0 0.00": ("#f5f7fa", None),
        "L0H1 0.50": ("#7d9cc0", "on"),
        "L1H0 1.00": ("#122f55", "on"),
        "L1H1: no value": (None, "none"),
    }
    signed = site_figures.heat_map([[-1.0, 0.0, 3.0]], "signed")
    assert 'fill="#f5f7fa"><title>L0H1 0.00' in signed  # 0 is the middle of the scale
    assert 'fill="#b4430c"><title>L0H2 3.00' in signed


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "0.00"), (-0.5, "−0.50"), (447.4, "447"), (14500.0, "14,500")]
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert site_figures.number(value) == said


def test_pictures_of_written_pages_are_drawn() -> None:
    drawn = {page: site_measured.drawn(text) for page, text in pages.written().items()}
    assert not [page for page, text in drawn.items() if re.search("<!-- (heads|sentence)", text)]
    assert "<svg" in drawn["concepts/sinks.md"]
    assert 'title="0.96"> apple</span>' in drawn["index.md"]


def test_typical_values_are_those_measured() -> None:
    """The table of a score from the committed scan, counted anew."""
    values = site_measured.measured()["scores"]["retrieval"]["values"]
    flat = sorted((v for row in values for v in row), reverse=True)
    page = MADE["catalogue/scores/retrieval.md"]
    assert f"| at 0.10 or more | {sum(v >= 0.1 for v in flat)} of 270 |" in page
    assert "| strongest | L18H6 1.00, L23H7 " in page
    assert page.count("<title>") == 270
    drain = MADE["catalogue/scores/value_drain.md"]
    named = re.findall(r"L\d+KV(\d+) ", drain)  # once a key/value head; SmolLM2 has three a layer
    assert named and set(named) <= {"0", "1", "2"} and "| median |" in drain


def test_scores_of_text_are_measured() -> None:
    """All that SmolLM2 can have; scores that only some architectures have say so."""
    made = site_measured.measured()["scores"]
    for name in KINDS["scores"].registry.names():
        score = KINDS["scores"].registry.get(name)
        if not (score.needs_images or score.needs_site or score.tower):
            assert name in made, f"run docs/site/measure.py: {name} is not in measured.json"


def test_rows_of_results_go_to_their_own_entry() -> None:
    names: Mapping[str, str] = {"eap": "EAP", "eap_ig": "EAPIG", "gate": "Gate"}
    of = lambda row: site_measured._of(row, dict(names))  # noqa: E731
    assert of("EAP-IG, inputs") == "eap_ig" and of("EAP") == "eap"
    assert of("Gate α = 0.5, 64 + 256") == "gate" and of("HeadGate, 50 %") == ""


def test_pictures_are_small() -> None:
    drawn = sum(len(f) for t in MADE.values() for f in re.findall(r"<svg.*?</svg>", t))
    assert 0 < drawn < 1.5e6
