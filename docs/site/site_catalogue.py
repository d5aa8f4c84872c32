"""The catalogue's pages: one for each score, edit, task, procedure and method, made of its
docstring, its class attributes and what was measured. A new entry has its page by being listed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import site_measured
from site_docstrings import MISLEADS, first_sentence, section
from site_links import DOCS, anchors

from interp.cli.catalogue import KINDS

#: kind → (title of its index, what it is)
ABOUT = {
    "scores": ("Scores", "A number a head: what it looks at, or what it does."),
    "edits": ("Edits", "Changes of attention while a block is open."),
    "tasks": ("Tasks", "Seeded problems with known answers."),
    "circuits": ("Circuit methods", "Which heads does the model need for a task?"),
    "calibration": ("Calibration", "Settings of an edit, chosen on training problems."),
    "procedures": ("Procedures", "What takes several forwards, other positions or predictions."),
    "probes": ("Probes", "The inputs on which scores are measured."),
}
#: kinds whose entries a user calls by their class
CLASSES = ("edits", "procedures")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def navigation() -> list[Any]:
    """The kinds and their pages, for mkdocs.yml's `nav`."""
    return [
        {title: [f"catalogue/{kind}/index.md", *(_path(kind, n) for n in names(kind))]}
        for kind, (title, _) in ABOUT.items()
    ]


def names(kind: str) -> list[str]:
    """Names of a kind, in the order in which they are listed."""
    return KINDS[kind].registry.names()


def pages() -> dict[str, str]:
    """path → markdown, of all entries and an index a kind."""
    made = {f"catalogue/{kind}/index.md": _index(kind) for kind in ABOUT}
    for kind in ABOUT:
        for name in names(kind):
            made[_path(kind, name)] = page(kind, name)
    return made


def documented() -> dict[str, str]:
    """page → where what it is about is defined, as "module.Class"."""
    return {
        _path(kind, name): _where(_class(KINDS[kind].registry.get(name)))
        for kind in ABOUT
        for name in names(kind)
    }


def page(kind: str, name: str) -> str:
    """The page of one entry."""
    entry = KINDS[kind].registry.get(name)
    cls = _class(entry)
    title = getattr(cls, "title", "") or (cls.__name__ if kind in CLASSES else name)
    parts = [
        f"# {title}",
        _said(kind, entry, cls),
        *_formula(entry),
        _facts(kind, name, entry, cls),
    ]
    shown = SHOWN.get(kind, _nothing)(name, entry)
    if shown:
        parts += [f"## {_heading(kind, name, entry)}", shown]
    if misleads := section(cls, MISLEADS):
        parts += ["## When it misleads", _text(misleads)]
    if used := USES.get(kind, _nothing)(name, entry):
        parts += ["## Use", used]
    parts += ["## Definition", f"::: {_where(cls)}\n    options:\n      {ROOT_HEADING[kind]}"]
    return "\n\n".join(parts) + "\n"


def _class(entry: Any) -> Any:
    """What holds an entry's docstring: a class or a function."""
    return entry if inspect.isclass(entry) or inspect.isroutine(entry) else type(entry)


def _where(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _path(kind: str, name: str) -> str:
    return f"catalogue/{kind}/{name}.md"


def _index(kind: str) -> str:
    title, said = ABOUT[kind]
    entries = {name: KINDS[kind].registry.get(name) for name in names(kind)}
    rows = [
        f"| [{name}]({name}.md) | {_cell(_said(kind, entry, _class(entry)))} |"
        for name, entry in entries.items()
    ]
    table = "\n".join(["| | |", "|---|---|", *rows])
    return f"# {title}\n\n{said} `interp list {kind}` prints their names.\n\n{table}\n"


def _said(kind: str, entry: Any, cls: Any) -> str:
    reading = getattr(entry, "reading", "")
    said = reading if isinstance(reading, str) and reading else ""
    summary = getattr(cls, "summary", "")
    if not said and isinstance(summary, str) and summary:
        said = summary[0].upper() + summary[1:].rstrip(".") + "."
    return _text(said or first_sentence(cls))


def _formula(entry: Any) -> list[str]:
    formula = getattr(entry, "formula", "")
    return [f"```text\n{formula}\n```"] if formula else []


def _facts(kind: str, name: str, entry: Any, cls: Any) -> str:
    """The table of what class attributes say."""
    facts = {"name": f"`{name}`", **FACTS.get(kind, lambda *_: {})(entry)}
    if citation := getattr(entry, "citation", "") or _cited(cls):
        facts["from"] = ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", citation)
    if found := _in_methods(kind, cls.__name__, name):
        heading, anchor = found
        facts["more"] = f"[{heading}](../../methods.md#{anchor}), with what is published"
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items())


def _cited(cls: Any) -> str:
    """The first paper in brackets of a docstring; "" for none."""
    text = " ".join((cls.__doc__ or "").split())
    found = re.search(r"\(([^()]*arXiv \d{4}\.\d{4,5})", text)
    return found[1] if found else ""


def _score_facts(score: Any) -> dict[str, str]:
    of = {"head": "a head", "kv_head": "a key/value head", "layer": "a layer"}[score.grain]
    facts = {"a value belongs to": of + (" of the vision tower" if score.tower else "")}
    facts["unit"] = score.unit or "a share, or a rate"
    if score.threshold is not None:
        facts["counts from"] = f"{score.threshold:g}"
    if score.role:
        facts["makes a head"] = f"“{score.role}”, on its card"
    probe = score.probe
    own = f"runs of its own: {getattr(score, 'passes', '')}"
    facts["measured on"] = own if probe == "own" else f"[{probe}](../probes/{probe}.md)"
    facts["in default scans"] = "yes" if score.default else "no: by name"
    return facts


def _task_facts(task: Any) -> dict[str, str]:
    return {"judged": task.judge, "formats": ", ".join(task.formats)}


def _circuit_facts(method: Any) -> dict[str, str]:
    facts = {"unit": method.unit or "none"}
    if method.presets:
        facts["presets"] = ", ".join(f"`{p}`" for p in method.presets)
    return facts


def _calibration_facts(method: Any) -> dict[str, str]:
    return {"task, if none is named": f"[{method.usual_task}](../tasks/{method.usual_task}.md)"}


def _edit_facts(edit: Any) -> dict[str, str]:
    scope = getattr(edit, "scope", "")
    return {"scope, unless told otherwise": f"`{scope}`"} if scope else {}


def _score_use(name: str, score: Any) -> str:
    if score.needs_site or score.needs_images or score.tower:
        return ""
    command = f"On the command line: `interp scan-heads --model smollm2-135m --scores {name}`."
    if score.needs_words:  # pocket-llama's tokenizer has none
        return command
    return (
        "```python\nimport interp\n\n"
        'model = interp.load("llama")  # or smollm2-135m, a hub id, a folder\n'
        f'atlas = interp.scan_heads(model, "{name}", context=128, samples=2, progress=False)\n'
        f'atlas.ranking("{name}")[:5]\n```\n\n{command}'
    )


def _task_use(name: str, task: Any) -> str:
    model = "llava" if name in ("pope", "chair") else "llama"
    return (
        "```python\nimport interp\n\n"
        f'interp.evaluate("{model}", task="{name}", n=32).frame\n```\n\n'
        f"On the command line: `interp evaluate --model {model} --task {name}`."
    )


def _circuit_use(name: str, method: Any) -> str:
    return (
        "```python\nfrom interp.circuits import find\n\n"
        f'circuit = find("llama", "ioi", "{name}", n=4)\n'
        "circuit.heads(4)  # strongest first\n```\n\n"
        f"On the command line: `interp circuit --model llama --task ioi --method {name}`."
    )


def _calibration_use(name: str, method: Any) -> str:
    return (
        f"On the command line `interp calibrate --model llama --method {name} --out my-edit.json`, "
        f'in Python `interp.calibrate(model, "{name}")`.'
    )


def _edit_shown(name: str, edit: Any) -> str:
    classes = {n: KINDS["edits"].registry.get(n).__name__ for n in names("edits")}
    return _linked(site_measured.result_rows(classes, name))


def _procedure_shown(name: str, entry: Any) -> str:
    classes = {n: KINDS["procedures"].registry.get(n).__name__ for n in names("procedures")}
    return _linked(site_measured.result_rows(classes, name))


def _circuit_shown(name: str, method: Any) -> str:
    classes = {n: KINDS["circuits"].registry.get(n).__name__ for n in names("circuits")}
    parts = [site_measured.circuit_section(name), site_measured.result_rows(classes, name)]
    return "\n\n".join(p for p in parts if p)


def _heading(kind: str, name: str, entry: Any) -> str:
    """Above what was measured: on which model, where it is one."""
    if kind not in ("scores", "tasks"):
        return "What was measured"
    pictures = getattr(entry, "needs_images", False) or name in ("pope", "chair")
    return "On smol-llava" if pictures else "On SmolLM2"


def _linked(rows: str) -> str:
    said = "Paired changes with 95 % intervals; sizes, settings and controls in [results]"
    return f"{rows}\n\n{said}(../../results.md)." if rows else ""


def _nothing(name: str, entry: Any) -> str:
    return ""


FACTS: dict[str, Callable[[Any], dict[str, str]]] = {
    "scores": _score_facts,
    "tasks": _task_facts,
    "circuits": _circuit_facts,
    "calibration": _calibration_facts,
    "edits": _edit_facts,
}
SHOWN: dict[str, Callable[[str, Any], str]] = {
    "scores": lambda name, score: site_measured.score_section(score),
    "tasks": lambda name, task: site_measured.task_section(name),
    "circuits": _circuit_shown,
    "edits": _edit_shown,
    "procedures": _procedure_shown,
}
USES: dict[str, Callable[[str, Any], str]] = {
    "scores": _score_use,
    "tasks": _task_use,
    "circuits": _circuit_use,
    "calibration": _calibration_use,
}


#: whether the signature says something: a score has no settings
ROOT_HEADING = {
    **dict.fromkeys(ABOUT, "show_root_toc_entry: false"),
    **dict.fromkeys(("scores", "probes"), "show_root_heading: false"),
}


def _in_methods(kind: str, cls: str, name: str) -> tuple[str, str] | None:
    """(heading, anchor) of the section of methods.md that is called as a class or an entry is, or
    else names it; sections of its own kind come first."""
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rooms = re.split(r"^# ", text, flags=re.MULTILINE)[1:]
    rooms.sort(key=lambda room: not room.lower().startswith(kind))
    parts = [p.partition("\n") for room in rooms for p in re.split(r"^## ", room, flags=re.M)[1:]]
    called = {_plain(cls), _plain(name)}
    by_title = (t for t, _, _ in parts if called & set(map(_plain, re.split(", | and ", t))))
    by_class = (t for t, _, body in parts if re.search(rf"`(?:[\w.]+\.)?{cls}`", body))
    by_name = (t for t, _, body in parts if re.search(rf"`{name}`", body))
    found = next((title for titles in (by_title, by_class, by_name) for title in titles), None)
    return None if found is None else (found, next(iter(anchors(f"## {found}"))))


def _plain(name: str) -> str:
    return re.sub(r"[ _-]", "", name).lower()


def _text(said: str) -> str:
    """Prose of a docstring as markdown: what looks like a tag is none."""
    return re.sub(r"<(?=[\w/])", "&lt;", said)


def _cell(said: str) -> str:
    return _text(" ".join(said.split())).replace("|", "\\|")
