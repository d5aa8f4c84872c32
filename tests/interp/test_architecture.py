"""The house: arrows only downwards, nothing heavy imported early, no pickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = {
    name: Path(next(iter(find_spec(name).submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    for name in ("interp", "interp_hooks", "interp_kernels", "interp_vllm")
}
STANDARD = set(sys.stdlib_module_names)
#: what each floor may import beside the standard library and itself
ALLOWED = {
    "interp_kernels": {"torch", "triton", "numpy", "typing_extensions"},  # a part of torch's
    "interp_hooks": {
        "torch",
        "triton",
        "numpy",
        "transformers",
        "interp_kernels",
        "lazy_loader",
        "PIL",  # of a picture in the load-time check: the processor brought it
        "tokenizers",  # of tiny models for the conformance table: comes with transformers
    },
    # on the floor of the hooks: another way into a model; vllm brings fastapi
    "interp_vllm": {
        "torch",
        "interp_hooks",
        "interp_kernels",
        "lazy_loader",
        "safetensors",
        "vllm",
        "fastapi",
    },
}
#: distributions the top floor depends on
TOP = {
    "interp_hooks",
    "interp_kernels",
    "interp_vllm",
    "torch",
    "transformers",
    "plotly",
    "numpy",
    "pandas",
    "safetensors",
    "typer",
    "rich",
    "scipy",
    "jinja2",
    "lazy_loader",
    "PIL",
    "platformdirs",
    "filelock",
    "gguf",
    "torchao",
    "huggingface_hub",  # these two come with transformers
    "tokenizers",
    "typing_extensions",  # for type checkers; torch brings it
}
#: what one file of the top floor may import beside: packages of optional extras
OPTIONAL = {
    "evaluation/lm_eval.py": {"lm_eval", "datasets"},
    "circuits/methods/sae.py": {"sae_lens"},
    "workers/pool.py": {"ray"},
    "models/drawing.py": {"diffusers"},
    "diffusion/draw.py": {"diffusers"},
    "serving/check.py": {"vllm"},
}
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "ray",
    "diffusers",
    "pandas",
    "plotly",
    "triton",
    "scipy",
    "jinja2",
)


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, at any depth of the file, and of import_module("…") with a
    literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant):
                yield str(literal.value), node.lineno


def strangers(source: str, allowed: set[str]) -> list[str]:
    """Top-level packages imported that are neither standard nor allowed, with their lines."""
    found = [(module.split(".")[0], line) for module, line in imported(ast.parse(source))]
    return [f"{name} (line {line})" for name, line in found if name not in allowed | STANDARD]


@pytest.mark.parametrize("package", ALLOWED)
def test_lower_floors_import_only_what_they_may(package: str) -> None:
    files = sources(package)
    assert len(files) > 4
    for path in files:
        allowed = ALLOWED[package] | {package}
        assert not strangers(path.read_text(encoding="utf-8"), allowed), path


def test_top_floor_imports_only_its_dependencies() -> None:
    for path in sources("interp"):
        extra = OPTIONAL.get(path.relative_to(PACKAGES["interp"]).as_posix(), set())
        assert not strangers(path.read_text(encoding="utf-8"), TOP | extra | {"interp"}), path


def test_optional_files_are_there() -> None:
    for path, names in OPTIONAL.items():
        text = (PACKAGES["interp"] / path).read_text(encoding="utf-8")
        assert len(strangers(text, TOP | {"interp"})) >= len(names), path


def test_the_check_itself_sees_lazy_imports() -> None:
    lazy = (
        "def f():\n    import transformer_lens\n    from interp.scan.run import Plan\n    "
        "import_module('sae_lens.x')"
    )
    assert len(strangers(lazy, ALLOWED["interp_hooks"])) == 3
    assert not strangers("import os\nfrom torch import nn", ALLOWED["interp_hooks"])


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the three packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sources(package):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


@cache
def arrows() -> dict[str, set[str]]:
    """module → modules of ours that it imports, at any depth, for typing alone too."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        mine = found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                mine |= {m if m in known else node.module for m in inner} & set(known)
            elif isinstance(node, ast.Import):
                mine |= {alias.name for alias in node.names} & set(known)
        mine.discard(name)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle of a graph, in order; [] where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_import_circles() -> None:
    assert circle(arrows()) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


#: which room may import which, beside `errors` and `support`, that all may. A room is a folder of
#: `interp`, or a module beside them. The arrows run one way, so the rooms stand on each other.
ROOMS: dict[str, str] = {
    # data, and what knows no models
    "errors": "",
    "support": "",
    "heads": "",
    "models": "",
    "scenes": "",
    "inputs": "",
    "results": "",
    "results.interchange": "results",
    "report": "results",
    "streams": "inputs",
    "look": "inputs report results streams",
    "model": "inputs look",
    "loading": "model models",
    # what a model is asked, and how it is changed
    "tasks": "inputs scenes",
    "vision": "inputs results scenes",
    "edits": "inputs loading model results.interchange tasks vision",
    "nn": "edits",
    "probes": "inputs tasks vision",
    "evaluation": "edits inputs loading results tasks vision",
    "mechanics": "edits evaluation inputs loading results streams tasks",
    "scores": "edits inputs mechanics probes vision",
    "atlas": "report results results.interchange scores",
    "scan": "atlas inputs loading mechanics probes results scores streams vision",
    "procedures": "inputs loading vision",
    "baking": "edits loading",
    "caches": "edits evaluation inputs loading results results.interchange scan tasks",
    "serving": "edits loading models",
    "calibration": "edits evaluation inputs loading tasks",
    "diffusion": "calibration edits evaluation loading",
    # circuits, from runs up to the circuit
    "circuits.runs": "evaluation inputs streams tasks",
    "circuits.methods": "circuits.runs results streams",
    "circuits.known": "inputs models tasks",
    "circuits.judging": (
        "circuits.known circuits.methods circuits.runs edits evaluation inputs loading report "
        "results tasks"
    ),
    "circuits.drawing": "circuits.judging circuits.known report results",
    "circuits": (
        "atlas circuits.drawing circuits.judging circuits.known circuits.methods circuits.runs "
        "inputs loading report results tasks"
    ),
    "circuits.benching.controls": "circuits.methods circuits.runs",
    "circuits.benching": (
        "circuits circuits.benching.controls circuits.judging circuits.known circuits.methods "
        "circuits.runs inputs loading tasks"
    ),
    # one run in many processes
    "workers": (
        "atlas circuits circuits.known circuits.methods circuits.runs evaluation loading probes "
        "results scan scores tasks"
    ),
    # what a scan will cost
    "costs": "loading models scan scores tasks",
    # the command line sees all, and nothing sees it
    "cli": (
        "atlas baking caches calibration circuits circuits.benching circuits.drawing "
        "circuits.judging circuits.known circuits.methods circuits.runs costs edits evaluation "
        "inputs loading look models probes procedures report results results.interchange scores "
        "serving tasks vision workers"
    ),
}
#: rooms of the lower floors: the first named may import the second
LOWER = {
    ("interp_hooks.huggingface", "interp_hooks"),
    ("interp_hooks.transformer_lens", "interp_hooks"),
    ("interp_hooks.hooking", "interp_hooks"),
    ("interp_hooks.conformance", "interp_hooks"),
    ("interp_hooks.conformance", "interp_hooks.hooking"),
    ("interp_hooks.conformance", "interp_hooks.huggingface"),
    ("interp_hooks.diffusion", "interp_hooks"),
    ("interp_hooks.hooking", "interp_hooks.diffusion"),
    ("interp_hooks.hooking", "interp_hooks.huggingface"),
    ("interp_hooks.hooking", "interp_hooks.transformer_lens"),
}


def room(module: str) -> str:
    """The room of a module of `interp`: its folder, or itself beside the folders."""
    parts = module.split(".")[1:]
    inside = modules()[module].name == "__init__.py"
    return ".".join(parts if inside or len(parts) == 1 else parts[:-1])


def wrong_arrows(graph: dict[str, set[str]], rules: dict[str, str]) -> list[str]:
    """Each arrow between rooms of `interp` that no rule allows, with the rule that it breaks."""
    found = []
    for module, others in graph.items():
        if not module.startswith("interp."):
            continue
        mine = room(module)
        allowed = {*rules[mine].split(), "errors", "support", mine}
        for other in sorted(o for o in others if o.startswith("interp.")):
            if room(other) not in allowed:
                may = rules[mine] or "nothing more"
                found.append(
                    f"{module} imports {other}: {mine} may import errors, support and {may}"
                )
    return found


def test_rooms_import_only_what_they_may() -> None:
    assert wrong_arrows(arrows(), ROOMS) == []


def test_a_wrong_arrow_is_named_with_its_rule() -> None:
    graph = {"interp.report.page": {"interp.atlas", "interp.results.head_table"}}
    assert wrong_arrows(graph, ROOMS) == [
        "interp.report.page imports interp.atlas: report may import errors, support and results"
    ]


def test_rooms_stand_on_each_other() -> None:
    """The table has a line for every room, and no circle."""
    assert {room(m) for m in modules() if m.startswith("interp.")} == set(ROOMS)
    assert circle({name: set(rule.split()) for name, rule in ROOMS.items()}) == []


def test_rooms_of_the_hooks() -> None:
    """Adapters are below nothing but `hook`, and never reach each other."""

    def place(module: str) -> str:
        parts = module.split(".")
        if module == "interp_hooks.hooking":
            return module
        folder = len(parts) > 2 or modules()[module].name == "__init__.py"
        return ".".join(parts[:2]) if folder else "interp_hooks"

    for module, others in arrows().items():
        for other in (o for o in others if module.startswith("interp_hooks.")):
            if other.startswith("interp_hooks.") and place(module) != place(other):
                assert (place(module), place(other)) in LOWER, f"{module} imports {other}"


def test_few_modules_beside_the_rooms() -> None:
    beside = [p.stem for p in PACKAGES["interp"].glob("*.py") if p.name != "__init__.py"]
    assert len(beside) <= 5, beside


@pytest.mark.slow
def test_each_file_can_be_imported_first() -> None:
    """A fresh interpreter can import every module, each on its own first."""
    names = [n for n in modules() if not n.endswith("__main__")]
    script = (
        "import sys, importlib\n"
        f"ours = set({list(PACKAGES)!r})\n"
        f"for name in {names!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] in ours]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_edits_are_written_to_only_when_they_are_made() -> None:
    """`object.__setattr__` stands in `__post_init__` alone, everywhere: a frozen value stays."""
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef) or node.name == "__post_init__":
                    continue
                calls = (ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call))
                assert "object.__setattr__" not in calls, f"{path}: {node.name}"


def environment() -> dict[str, str]:
    import os

    return {
        **os.environ,
        "PYTHONPATH": ":".join(dict.fromkeys(str(p.parent) for p in PACKAGES.values())),
    }


@pytest.mark.parametrize(
    "module",
    ["interp", "interp.cli.main", "interp_hooks", "interp_vllm", "interp.scores", "interp.models"],
)
def test_light_imports(module: str) -> None:
    script = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import interp
    import interp_hooks

    for package in (interp, interp_hooks):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError):
            package.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pickle(package: str) -> None:
    """Weights are safetensors only; nothing unpickles."""
    for path in sources(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {m.split(".")[0] for m, _ in imported(tree)}
        assert not modules & {
            "pickle",
            "cPickle",
            "dill",
            "joblib",
            "shelve",
            "cloudpickle",
            "marshal",
        }, path
        calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        bad = {
            "torch.load",
            "torch.save",
            "pd.read_pickle",
            "pandas.read_pickle",
            "eval",
            "exec",
            "np.load",
        }
        assert not bad & set(calls), path


#: how the library asks for a model's weights
WEIGHTS = "class_of(config, trust).from_pretrained"


def test_weights_are_asked_for_as_safetensors() -> None:
    """Every from_pretrained that loads a model's weights says use_safetensors=True."""
    found = 0
    for path in sources("interp"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == WEIGHTS:
                values = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert values.get("use_safetensors") == "True", path
                found += 1
    assert found >= 1
