"""The house: arrows only downwards, nothing heavy imported early, no pickles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = {
    name: Path(next(iter(find_spec(name).submodule_search_locations)))  # type: ignore[union-attr, arg-type]
    for name in ("interp", "interp_hooks", "interp_kernels")
}
STANDARD = set(sys.stdlib_module_names)
#: what each floor may import beside the standard library and itself
ALLOWED = {
    "interp_kernels": {"torch", "triton", "numpy"},
    "interp_hooks": {"torch", "triton", "numpy", "transformers", "interp_kernels"},
}
#: distributions the top floor depends on
TOP = {
    "interp_hooks",
    "interp_kernels",
    "torch",
    "triton",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "plotly",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "typer",
    "rich",
    "einops",
    "jaxtyping",
    "click",
    "huggingface_hub",
    "PIL",
    "lm_eval",
    "datasets",  # of an optional extra, imported where a task of it is asked for
}
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "pandas",
    "plotly",
    "triton",
    "scipy",
)


#: what one file may import when an optional extra is installed
OPTIONAL = {"harness.py": {"lm_eval", "datasets"}}


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
        assert not strangers(path.read_text(encoding="utf-8"), ALLOWED[package] | {package}), path


def test_top_floor_imports_only_its_dependencies() -> None:
    for path in sources("interp"):
        extra = OPTIONAL.get(path.name, set())
        assert not strangers(path.read_text(encoding="utf-8"), TOP | extra | {"interp"}), path


def test_the_check_itself_sees_lazy_imports() -> None:
    lazy = (
        "def f():\n    import transformer_lens\n    from interp.scan.run import Plan\n    "
        "import_module('sae_lens.x')"
    )
    assert len(strangers(lazy, ALLOWED["interp_hooks"])) == 3
    assert not strangers("import os\nfrom torch import nn", ALLOWED["interp_hooks"])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_cycles_between_files_at_import_time(package: str) -> None:
    """A fresh interpreter can import every module of a package, each on its own first."""
    names = []
    for path in sources(package):
        parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
        names.append(".".join((package, *(p for p in parts if p != "__init__"))))
    script = (
        "import sys, importlib\n"
        f"base = set(sys.modules)\n"
        f"for name in {[n for n in names if not n.endswith('__main__')]!r}:\n"
        f"    for loaded in [m for m in sys.modules if m.split('.')[0] in {set(PACKAGES)!r}]: del "
        "sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def environment() -> dict[str, str]:
    import os

    return {
        **os.environ,
        "PYTHONPATH": ":".join(dict.fromkeys(str(p.parent) for p in PACKAGES.values())),
    }


@pytest.mark.parametrize(
    "module", ["interp", "interp.cli.main", "interp_hooks", "interp.scores", "interp.models"]
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


def test_weights_are_asked_for_as_safetensors() -> None:
    """Every from_pretrained that loads a model's weights says use_safetensors=True."""
    found = 0
    for path in sources("interp"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("kind.from_pretrained",):
                values = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert values.get("use_safetensors") == "True", path
                found += 1
    assert found >= 1
