"""The documentation site, built: strictly, and for readers without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "docs/site/mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site") / "html"
    paths = [str(ROOT), str(ROOT / "hooks"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-f", str(CONFIG)]
    done = subprocess.run(
        [*command, "-d", str(folder)], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_no_page_asks_a_network(site: Path) -> None:
    """Scripts, styles, pictures and fonts are in the folder; links that a reader follows may leave
    it."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source|object)\b[^>]*>", text):
            for target in re.findall(r'(?:src|href|data)="([^"]*)"', tag):
                assert not re.match(r"(?:https?:)?//", target), f"{page.name}: {tag}"
    for sheet in site.rglob("*.css"):
        assert not re.search(
            r"(?:url\(|@import )['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")
        )


def test_search_works_from_disk(site: Path, tmp_path: Path) -> None:
    from browser import browser

    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    page = f"{(site / 'index.html').as_uri()}?q=induction"
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=300)
    assert re.search(r"\d+ matching documents", done.stdout)
    assert "catalogue/scores/induction.html" in done.stdout
