"""Full and read-only disks, damaged pieces, other results in the place, memory that runs out: each
is answered in a sentence or measured again, and no number is another's."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.errors import OutputError
from interp.scan.run import plan_scan
from interp.support import files
from interp.support.checkpoints import Checkpoints, Record
from interp.support.finished import vacant
from interp.support.memory import is_out_of_memory
from interp_hooks import HookedModel

SCORES = ["sink", "induction"]


@pytest.fixture(scope="module")
def model(worded: Callable[[str], Any]) -> HookedModel:
    return worded("llama")[0]


@pytest.fixture(scope="module")
def whole(model: HookedModel) -> pd.DataFrame:
    """What an undisturbed scan gives."""
    return scan(model).run(None).frame


def scan(model: HookedModel, seed: int = 0, scores: Any = SCORES) -> Any:
    return plan_scan(model, scores, 48, 1, seed)


class Stop(Exception):
    pass


def stop_after(pieces: int) -> Callable[[int, int, str], None]:
    calls: list[str] = []

    def progress(done: int, total: int, label: str) -> None:
        calls.append(label)
        if len(calls) > pieces:
            raise Stop

    return progress


def interrupted(model: HookedModel, folder: Path, **how: Any) -> list[Path]:
    """The files of a scan that was stopped after its first piece."""
    with pytest.raises(Stop):
        scan(model, **how).run(folder, stop_after(1))
    found = sorted((folder / "partial").iterdir())
    assert len(found) == 2
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# --- damaged pieces


def records(n: int = 3) -> list[Record]:
    return [Record("sink", i, "", "self", 0, i, i / 7) for i in range(n)]


def test_a_piece_with_any_byte_turned_or_cut_is_no_piece(tmp_path: Path) -> None:
    pieces = Checkpoints(tmp_path, {"model": "a"})
    pieces.save("text-0000", records())
    (file,) = (tmp_path / "partial").glob("*.parquet")
    whole = file.read_bytes()
    assert pd.read_parquet(file).value.tolist() == [r.value for r in records()]
    for place in range(0, len(whole), 97):
        for content in (
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            whole[:place],
        ):
            file.write_bytes(content)
            assert not pieces.has("text-0000")
    with pytest.raises(OutputError, match="missing or damaged"):
        pieces.records(["text-0000"])
    file.write_bytes(whole)
    assert pieces.has("text-0000")
    file.rename(file.with_name(file.name.replace("text", "niah")))
    assert not pieces.has("niah-0000")  # one piece under another's name
    assert Checkpoints(tmp_path, {"model": "b"}).kept == 0  # another run's


def test_names_of_pieces_are_no_ways_out(tmp_path: Path) -> None:
    pieces = Checkpoints(tmp_path / "in", {})
    for key in ("own-../../x", "/etc/x", "own-ä b", "", ".."):
        pieces.save(key, records(1))
        assert pieces.has(key) and len(pieces.records([key])) == 1
    assert names(tmp_path)[:2] == ["in", "in/partial"] and pieces.kept == 5
    assert all(name.startswith("in") for name in names(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "turned", "gone", "empty"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_store_gives_the_same_numbers(
    model: HookedModel, whole: pd.DataFrame, tmp_path: Path, damage: str, which: int
) -> None:
    file = interrupted(model, tmp_path)[which]
    raw = file.read_bytes()
    middle = len(raw) // 2
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(
            {
                "cut": raw[:middle],
                "turned": raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :],
                "empty": b"",
            }[damage]
        )
    atlas = scan(model).run(tmp_path)
    assert atlas.frame.equals(whole)
    said = [note for note in atlas.notes if "damaged" in note or "did not fit" in note]
    assert len(said) == (damage != "gone" or file.name == "fingerprint.json")
    assert names(tmp_path) == ["atlas.json", "atlas.parquet", "evidence.json"]


# --- other runs' pieces and results


def test_pieces_of_an_edited_model_are_not_used(
    model: HookedModel, whole: pd.DataFrame, tmp_path: Path
) -> None:
    with model.edit(interp.edits.ScaleHeads({"L0H1": 0.0})):
        interrupted(model, tmp_path)
    atlas = scan(model).run(tmp_path)
    assert atlas.frame.equals(whole)
    (note,) = (note for note in atlas.notes if "did not fit" in note)
    assert "edits of a block around it" in note


def test_pieces_of_other_code_are_not_used(
    model: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, tmp_path)
    sink = type(interp.scores.get("sink"))
    measure = sink.measure
    monkeypatch.setattr(sink, "measure", lambda *given: measure(*given) * 0 + 0.25)
    atlas = scan(model).run(tmp_path)
    assert (atlas.frame.sink == 0.25).all() and any("other code" in n for n in atlas.notes)


def test_another_scans_result_is_not_replaced_unasked(model: HookedModel, tmp_path: Path) -> None:
    first = scan(model).run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"another run \(other inputs, seed\).*--overwrite"):
        scan(model, seed=1).run(tmp_path, stop_after(0))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert scan(model).run(tmp_path).frame.equals(first.frame)  # the same again
    other = scan(model, seed=1).run(tmp_path, overwrite=True)
    assert interp.Atlas.load(tmp_path).frame.equals(other.frame)
    (tmp_path / "atlas.json").write_text("{")
    with pytest.raises(OutputError, match="not known to be of this run"):
        scan(model).run(tmp_path)


def test_default_places_are_a_runs_own(model: HookedModel, tmp_path: Path) -> None:
    place = tmp_path / "scans" / "tiny"
    one, two = scan(model), scan(model, seed=1)
    assert one.folder(place) == two.folder(place) == place
    interrupted(model, place)
    assert one.folder(place) == place  # to resume from
    beside = two.folder(place)
    assert beside == place.with_name(f"tiny-{two.record()['fingerprint'][:8]}")
    two.run(beside)
    assert two.folder(place) == beside and one.folder(place) == place
    assert vacant(place, "atlas.json", two.record()) == beside


# --- the disk


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Writing fails from the k-th file on: {"after": k, "calls": 0}."""
    box = {"after": 10**9, "calls": 0, "errno": errno.ENOSPC}
    sync = os.fsync

    def full(handle: int) -> None:
        box["calls"] += 1
        if box["calls"] > box["after"]:
            raise OSError(box["errno"], os.strerror(box["errno"]))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    yield box


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_at_each_file_in_turn(
    model: HookedModel, tmp_path: Path, failing: dict[str, int], code: int
) -> None:
    wanted = scan(model).run(tmp_path / "whole").frame
    total, failing["errno"] = failing["calls"], code
    for after in range(total):
        folder = tmp_path / str(after)
        failing.update(after=after, calls=0)
        with pytest.raises(OutputError) as error:
            scan(model).run(folder)
        assert os.strerror(code).lower() in str(error.value) and "\n" not in str(error.value)
        left = names(folder) if folder.exists() else []
        assert not [n for n in left if n.endswith(".tmp") or "lock" in n]
        for name in left:
            if name.endswith(".json"):
                json.loads((folder / name).read_text())
        failing.update(after=10**9)
        assert scan(model).run(folder).frame.equals(wanted)
        assert interp.Atlas.load(folder).frame.equals(wanted)
        assert names(folder) == ["atlas.json", "atlas.parquet", "evidence.json"]


# --- memory


def out_of_memory(self: Any, *_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_memory_that_runs_out_in_a_probe_spares_the_rest(
    model: HookedModel, whole: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat = type(interp.probes.get("repeat"))
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "run", out_of_memory)
        atlas = scan(model).run(tmp_path)
        assert (
            "induction" in atlas.provenance["missing"] and "sink" not in atlas.provenance["missing"]
        )
        assert atlas.frame.induction.isna().all() and atlas.frame.sink.equals(whole.sink)
        assert sum("induction" in n and "memory ran out" in n for n in atlas.notes) == 1
        interp.Atlas.load(tmp_path)
        with pytest.raises(torch.OutOfMemoryError):  # nothing else is asked for
            scan(model, scores=["induction"]).run(None)
        assert model.observers_and_edits() == ([], [])


def test_the_missing_score_alone_is_measured_later(
    model: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of the memory: what was measured stands, and isn't run again."""
    probe = type(interp.probes.get("repeat"))
    plain, full = probe.run, tmp_path / "memory-is-full"
    full.touch()

    def run(*given: Any) -> None:
        if full.exists():
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        plain(*given)

    monkeypatch.setattr(probe, "run", run)
    scan(model).run(tmp_path / "out")
    assert len(list((tmp_path / "out" / "partial").glob("text-*.parquet"))) == 1
    full.unlink()
    atlas = scan(model).run(tmp_path / "out")
    assert atlas.frame.induction.notna().all() and "missing" not in atlas.provenance
    assert not [note for note in atlas.notes if "did not fit" in note]
    assert names(tmp_path / "out") == ["atlas.json", "atlas.parquet", "evidence.json"]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left"), False),
        (RuntimeError("a bug"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


# --- the command line


@pytest.mark.slow
def test_commands_say_it_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: HookedModel
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("interp.cli.common.load", lambda *_, **__: model)
    words = ["scan-heads", "--scores", "sink,induction", "--context", "48", "--samples", "2"]

    def run(*more: str, code: int = 0) -> Any:
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    run()
    done = run("--seed", "1")
    assert "holds another scan" in done.stderr and len(os.listdir("interp-scans")) == 2
    run("--out", "here")
    assert "--overwrite" in run("--out", "here", "--seed", "1", code=2).stderr
    run("--out", "here", "--seed", "1", "--overwrite")
    monkeypatch.setattr(type(interp.probes.get("repeat")), "run", out_of_memory)
    done = run("--out", "less", code=3)
    assert "memory ran out" in done.stdout and Path("less/report.html").is_file()
