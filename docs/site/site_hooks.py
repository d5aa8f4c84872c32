"""What mkdocs asks while it builds: the catalogue's and the reference's pages are made here, and
files outside docs/ that a page links to are copied into the site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import site_catalogue
import site_links
import site_measured
import site_reference
from mkdocs.structure.files import File, Files, InclusionLevel


def on_config(config: Any) -> Any:
    """The pages made here take their places in the navigation."""
    made = {
        "{catalogue}": site_catalogue.navigation(),
        "{reference}": site_reference.navigation(),
        "{notebooks}": [site_links.copy_of(path) for path in site_links.notebooks()],
    }
    config.nav = _placed(config.nav, made)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made here, and copies of what lies outside docs/."""
    made = {**site_catalogue.pages(), **site_reference.pages()}
    written = {f.src_uri: f.content_string for f in files.documentation_pages()}
    for place in site_links.wanted({**written, **made}):
        page = site_links.copied_page(place)
        content = (site_links.ROOT / place).read_bytes() if page is None else page
        notebook = place in site_links.notebooks()
        shown = InclusionLevel.INCLUDED if notebook else InclusionLevel.NOT_IN_NAV
        copy = site_links.copy_of(place)
        files.append(File.generated(config, copy, content=content, inclusion=shown))
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links out of docs/ lead to the copies; <!-- heads: SCORE --> is its heat map."""
    kept = site_links.kept_inside(page.file.src_uri, markdown)
    return site_measured.drawn(site_links.no_references(kept))


def _placed(nav: Any, made: dict[str, Any]) -> Any:
    if isinstance(nav, list):
        return [_placed(entry, made) for entry in nav]
    if isinstance(nav, dict):
        return {title: _placed(entry, made) for title, entry in nav.items()}
    return made.get(nav, nav)
