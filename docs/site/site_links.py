"""Links of the site's pages: those that leave docs/ get a copy inside the site; those that lead
nowhere are found."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import site_notebooks

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: where copies of files outside docs/ stand in the site
COPIES = "files"
#: what is put behind the name of a file of code, or a notebook, that becomes a page
PAGE = ".code.md"

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)


def links(markdown: str) -> list[str]:
    """Targets of a page's links and pictures, code left out."""
    text = re.sub(r"`[^`\n]+`", "", _FENCE.sub("", markdown))
    return [found[1] for found in _LINK.findall(text)]


def leaves(target: str) -> bool:
    """Whether a link names another site."""
    return bool(re.match(r"[a-z][a-z+.-]*:", target))


def outside(page: str, target: str) -> str:
    """The path in the repository of what a link of a page leads to outside docs/; "" if inside.

    Example:
        >>> outside("results.md", "../examples/act.py")
        'examples/act.py'
        >>> outside("how-to/chats.md", "../usage.md")
        ''
    """
    path = target.partition("#")[0]
    if leaves(target) or not path:
        return ""
    if page.startswith(f"{COPIES}/"):  # a copy: its links are those of its place in the repository
        place = posixpath.normpath(posixpath.join(original(page), "..", path))
    else:
        place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    return "" if place.startswith("docs/") else place


def original(page: str) -> str:
    """Where a copied page comes from in the repository."""
    return page.removeprefix(f"{COPIES}/").removesuffix(PAGE)


def copy_of(path: str) -> str:
    """Where a file of the repository stands in the site: code becomes a page, all else itself."""
    return f"{COPIES}/{path}" + (PAGE if path.endswith((".py", ".sh", ".ipynb")) else "")


def copied_page(path: str) -> str | None:
    """A copy that is a page, as markdown; None for other files."""
    if path.endswith(".ipynb"):
        return site_notebooks.page(ROOT / path)
    text = (ROOT / path).read_text(encoding="utf-8") if path.endswith((".py", ".sh", ".md")) else ""
    if path.endswith(".md"):
        return text
    if not text:
        return None
    language = "python" if path.endswith(".py") else "bash"
    return (
        f"---\nsearch:\n  exclude: true\n---\n\n# {posixpath.basename(path)}\n\n"
        f"`{path}`\n\n````{language}\n{text}````\n"
    )


def kept_inside(page: str, markdown: str) -> str:
    """A page whose links to files outside docs/ lead to their copies."""

    def turned(found: re.Match[str]) -> str:
        place = outside(page, found[2])
        if place:
            target = copy_of(place) + found[2][len(found[2].partition("#")[0]) :]
        elif page.startswith(f"{COPIES}/") and not leaves(found[2]) and found[2][0] != "#":
            place = posixpath.normpath(posixpath.join(original(page), "..", found[2]))
            target = place.removeprefix("docs/")
        else:
            return found[0]
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + found[3]

    return _outside_code(_LINK, turned, markdown)


def no_references(markdown: str) -> str:
    """A page without Markdown's [text][name], which nothing here means: rows of brackets stay."""
    pattern = re.compile(r"(`[^`\n]+`)|\]( ?)\[(?!\])")
    return _outside_code(pattern, lambda found: found[1] or f"]{found[2]}\\[", markdown)


def _outside_code(
    pattern: re.Pattern[str], turned: Callable[[re.Match[str]], str], text: str
) -> str:
    done, end = [], 0
    for fence in _FENCE.finditer(text):
        done += [pattern.sub(turned, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, pattern.sub(turned, text[end:])])


def notebooks() -> list[str]:
    """The notebooks, as paths in the repository."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "notebooks").glob("*.ipynb"))


def wanted(pages: Mapping[str, str]) -> list[str]:
    """The notebooks, and files of the repository that pages link to outside docs/, and their own
    in turn."""
    copies = {copy_of(path): copied_page(path) or "" for path in notebooks()}
    found: dict[str, None] = dict.fromkeys(notebooks())
    waiting = [*pages.items(), *copies.items()]
    while waiting:
        page, text = waiting.pop()
        for target in links(text):
            place = outside(page, target)
            if not place or place in found or not (ROOT / place).is_file():
                continue
            found[place] = None
            if place.endswith(".md"):
                waiting.append((copy_of(place), copied_page(place) or ""))
    return sorted(found)


def anchors(markdown: str) -> set[str]:
    """Ids of a page's headings, as Python-Markdown makes them."""
    # what mkdocstrings shows has its path as its id
    ids = set(re.findall(r"^::: ([\w.]+)$", markdown, re.MULTILINE))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", _FENCE.sub("", markdown), re.MULTILINE):
        own = re.search(r"\{ *#([\w.-]+) *\}", heading)
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", heading))
        slug = re.sub(r"[^\w\s-]", "", plain.encode("ascii", "ignore").decode()).strip().lower()
        name = own[1] if own else re.sub(r"[-\s]+", "-", slug)
        unique, n = name, 0
        while unique in ids:
            n += 1
            unique = f"{name}_{n}"
        ids.add(unique)
    return ids


def broken(pages: Mapping[str, str], files: Iterable[str]) -> list[str]:
    """ "page: target" of links that lead to no page, heading or file of the site."""
    there = {*pages, *files}
    found = []
    for page, text in pages.items():
        for target in links(kept_inside(page, text)):
            if leaves(target):
                continue
            path, _, anchor = target.partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
            place = place if path else page
            missing = anchor and place in pages and anchor not in anchors(pages[place])
            if place not in there or missing:
                found.append(f"{page}: {target}")
    return found
