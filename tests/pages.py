"""The code blocks of the documentation's pages, and how a page is run: from top to bottom, as its
reader would, in one folder and one Python process.

- ``bash``: each line is a command that must end with 0 and print something.
- ``python``: run in order, in one namespace; a ``text`` block right below is what it prints.
- ``json``: an edit file.
- A title says what a block needs: one of `RUNS_ON` (or, for all blocks of a page, a comment
  ``<!-- blocks run on: SmolLM2 -->``), or one of `NOT_RUN`, with the reason.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
#: titles of blocks that run
RUNS_ON = ("", "SmolLM2")
#: titles of blocks that do not, and why
NOT_RUN = {
    "once": "installs the package, which CI does first",
    "needs the hub and a GPU": "no test has a network, and few a GPU",
    "TransformerLens": "another library's half of a comparison",
    "nnsight": "another library's half of a comparison",
    "kvpress": "another library's half of a comparison",
    "vLLM": "needs an environment of its own",
}

_FENCE = re.compile(
    r'^(?P<indent> *)```(?P<kind>\w+)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)
_PAGE = re.compile(r"<!-- blocks run on: (\w+) -->")


@dataclass(frozen=True)
class Block:
    """A block of a page: its first line, language, title, text, and what it should print."""

    page: str
    line: int
    kind: str
    title: str
    text: str
    prints: str | None = None


def blocks(page: str, markdown: str) -> list[Block]:
    """The blocks of a page, in order."""
    usual = next(iter(_PAGE.findall(markdown)), "")
    found: list[Block] = []
    end = 0
    for fence in _FENCE.finditer(markdown):
        kind, text = fence["kind"], re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.M)
        adjoining = not markdown[end : fence.start()].strip()
        if kind == "text" and adjoining and found and found[-1].kind == "python":
            found[-1] = Block(**{**asdict(found[-1]), "prints": text})
        else:
            line = markdown[: fence.start()].count("\n") + 1
            found.append(Block(page, line, kind, fence["title"] or usual, text))
        end = fence.end()
    return found


def written() -> dict[str, str]:
    """page → markdown, of those written by hand."""
    files = [p for p in sorted(DOCS.rglob("*.md")) if p.parent.name != "site"]
    return {str(p.relative_to(DOCS)): p.read_text(encoding="utf-8") for p in files}


def made() -> dict[str, str]:
    """page → markdown, of those that the site makes of the catalogues."""
    if str(DOCS / "site") not in sys.path:
        sys.path.insert(0, str(DOCS / "site"))
    import site_catalogue

    return site_catalogue.pages()


def runnable(found: list[Block]) -> list[Block]:
    """Those that run, of a page's blocks."""
    return [b for b in found if b.kind in ("bash", "python") and b.title in RUNS_ON]


def run(found: list[Block], folder: Path, timeout: float = 1800) -> str:
    """Run blocks in a fresh process in a folder; "" or what went wrong, with page and line."""
    steps = json.dumps([asdict(b) for b in runnable(found)])
    done = subprocess.run(
        [sys.executable, __file__],
        input=steps,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return "" if done.returncode == 0 else f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _main() -> None:
    """Run the blocks that stand on stdin, as JSON."""
    names: dict[str, object] = {"__name__": "__main__"}
    for step in json.load(sys.stdin):
        block = Block(**step)
        if block.kind == "bash":
            _commands(block)
            continue
        printed = io.StringIO()
        code = compile("\n" * block.line + block.text, block.page, "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block.prints is not None and not doctest.OutputChecker().check_output(
            block.prints, printed.getvalue(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        ):
            sys.exit(f"{block.page}:{block.line} prints\n{printed.getvalue()}not\n{block.prints}")


def _commands(block: Block) -> None:
    for line in block.text.strip().splitlines():
        program, *arguments = shlex.split(line)
        if program != "interp":
            sys.exit(f"{block.page}:{block.line}: only interp's commands are run, not {line}")
        command = [sys.executable, "-m", "interp.cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not done.stdout.strip():
            sys.exit(f"{block.page}:{block.line}: {line}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    _main()
