"""Pages of the Python reference: a page a public package, made of the names in its stub."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import site_catalogue

#: page → (title, package, a sentence)
PACKAGES = {
    "interp": ("interp", "Loading, scanning, edits' effects: what most work needs."),
    "look": ("interp.look", "Where a head looks in a text."),
    "interp_hooks": ("interp_hooks", "Inside a model: what `interp.load` gives, and its parts."),
    "interp_kernels": ("interp_kernels", "Attention on tensors, with statistics and edits."),
    "circuits": ("interp.circuits", "Finding circuits and judging them."),
    "mechanics": ("interp.mechanics", "What weights say: OV, QK, composition, direct effects."),
    "evaluation": ("interp.evaluation", "Accuracy, loss, ablations."),
    "tasks": ("interp.tasks", "Seeded problems."),
    "edits": ("interp.edits", "What edits share; each has a page in the catalogue."),
    "caches": ("interp.caches", "Caches that hold keys head by head, and the choice of heads."),
    "nn": ("interp.nn", "Modules that change how attention trains."),
    "vision": ("interp.vision", "Prompts with pictures, image tokens, sinks."),
    "diffusion": ("interp.diffusion", "Pictures drawn under edits, and heads found for them."),
    "scenes": ("interp.scenes", "Rendered pictures, melodies and dots whose truth is known."),
    "models": ("interp.models", "Bundled and fetched models."),
    "errors": ("interp.errors", "What goes wrong, by type."),
}

#: shown beside a package's public names: what its functions give, and what these stand on
GIVEN = {
    "interp": {
        "Model": "interp.model.Model",
        "Card": "interp.report.card.Card",
        "HeadTable": "interp.results.head_table.HeadTable",
    },
    "interp_hooks": {"ModelFacts": "interp_hooks.model_facts.ModelFacts"},
}


def navigation() -> list[str]:
    """The pages in the order of the navigation."""
    return [f"reference/{page}.md" for page in PACKAGES]


def pages() -> dict[str, str]:
    """path → markdown. A class stands on one page: the catalogue's, or the first package's."""
    placed = {path: f"../{page}" for page, path in site_catalogue.documented().items()}
    made = {}
    for page, (package, said) in PACKAGES.items():
        here = {name: path for name, path in names(package).items() if path not in placed}
        elsewhere = {n: placed[p] for n, p in names(package).items() if p in placed}
        made[f"reference/{page}.md"] = _page(package, said, here, elsewhere)
        placed.update({path: f"{page}.md#{path}" for path in here.values()})
    return made


def names(package: str) -> dict[str, str]:
    """Public name → where it is defined, of what has a docstring of its own."""
    module = import_module(package)
    listed = getattr(module, "__all__", None) or _defined(module)
    found = dict(GIVEN.get(package, {}))
    for name in sorted(listed, key=str.lower):
        entry = getattr(module, name)
        if isinstance(entry, ModuleType) or not (inspect.isclass(entry) or callable(entry)):
            continue
        if name == getattr(entry, "__name__", "") and _documented(entry):
            found[name] = f"{entry.__module__}.{entry.__qualname__}"
    return found


def _documented(entry: Any) -> bool:
    return bool(entry.__doc__) and entry.__module__.startswith("interp")


def _defined(module: ModuleType) -> list[str]:
    return [n for n, e in vars(module).items() if getattr(e, "__module__", "") == module.__name__]


def _page(package: str, said: str, here: dict[str, str], elsewhere: dict[str, str]) -> str:
    parts = [f"# {package}\n\n{said}\n"]
    for path in here.values():
        shown = f"::: {path}\n    options:\n      heading_level: 2\n"
        parts.append(shown + ("      members: null\n" if _has_methods(path) else ""))
    if elsewhere:
        links = ", ".join(f"[`{name}`]({target})" for name, target in elsewhere.items())
        parts.append(f"## On other pages\n\n{links}\n")
    return "\n".join(parts)


def _has_methods(path: str) -> bool:
    """Whether a class has documented methods that its users call: not an error, not a base."""
    module, _, name = path.rpartition(".")
    entry = getattr(import_module(module), name)
    return inspect.isclass(entry) and not issubclass(entry, BaseException)
