"""Runs shared out to workers: the result of one process to the last digit, also where a worker is
killed or the run is broken off, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.errors import InputError, MissingExtraError, WorkerError
from interp.support.checkpoints import Checkpoints
from interp.workers.cluster import Cluster
from interp.workers.judging import ranges
from interp.workers.shares import onwards

SCAN: dict[str, Any] = dict(context=64, samples=3)

pytestmark = pytest.mark.usefixtures("one_thread")  # as many as a worker has


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    with interp.cluster(workers=2, threads=1) as cluster:
        yield cluster


def equal(one: interp.Atlas, two: interp.Atlas) -> bool:
    """Whether two atlases are the same in every bit, whoever made them."""
    assert one.massive is not None and two.massive is not None
    return (
        one.frame.equals(two.frame)
        and one.notes == two.notes
        and one.evidence == two.evidence
        and one.massive.frame.equals(two.massive.frame)
        and one.provenance["measured"] == two.provenance["measured"]
        and one.provenance["fingerprint"] == two.provenance["fingerprint"]
    )


@pytest.fixture(scope="module")
def alone(pocket: Any) -> interp.Atlas:
    return interp.scan_heads(pocket, "all", progress=False, **SCAN)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each piece was saved in this process."""
    counts: Counter[str] = Counter()
    save = Checkpoints.save

    def counted(self: Checkpoints, key: str, records: Any) -> None:
        counts[key] += 1
        save(self, key, records)

    monkeypatch.setattr(Checkpoints, "save", counted)
    return counts


@pytest.mark.slow
def test_two_workers_give_the_atlas_of_one_process(
    two: Cluster, alone: interp.Atlas, pocket: Any, saved: Counter[str], tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    atlas = two.scan_heads(
        pocket, "all", out=tmp_path, progress=lambda done, total, _: told.append((done, total)),
        **SCAN,
    )  # fmt: skip
    assert equal(alone, atlas)
    assert set(saved.values()) == {1} and len(saved) > 10
    assert atlas.provenance["workers"]["workers"] == 2 and not atlas.provenance["workers"]["lost"]
    assert told == sorted(told) and told[-1][0] == told[-1][1]  # one bar, full at the end
    assert equal(alone, interp.Atlas.load(tmp_path))
    assert not (tmp_path / "partial").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills by process id")
def test_a_killed_worker_is_replaced_and_its_piece_counted_once(
    two: Cluster, alone: interp.Atlas, pocket: Any, saved: Counter[str]
) -> None:
    killed: list[int] = []

    def kill(done: int, total: int, what: str) -> None:
        others = [] if two.pool is None else [int(w.rpartition(":")[2]) for w in two.pool.seen][:-1]
        if saved and others and not killed:  # who has not just answered has a piece in hand
            killed.append(others[-1])
            os.kill(killed[0], signal.SIGKILL)

    atlas = two.scan_heads(pocket, "all", progress=kill, **SCAN)
    assert killed and atlas.provenance["workers"]["lost"] == 1
    assert set(saved.values()) == {1}
    assert equal(alone, atlas)


@pytest.mark.slow
def test_what_workers_finished_one_process_goes_on_from(
    two: Cluster, alone: interp.Atlas, pocket: Any, saved: Counter[str], tmp_path: Path
) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if len(saved) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        two.scan_heads(pocket, "all", out=tmp_path, progress=stop, **SCAN)
    first = set(saved)
    assert len(first) == 4 == len(list((tmp_path / "partial").glob("*.parquet")))
    atlas = interp.scan_heads(pocket, "all", out=tmp_path, progress=False, **SCAN)
    assert set(saved.values()) == {1}  # none of the four again
    assert equal(alone, atlas)


@pytest.mark.slow
def test_heads_are_replaced_by_workers_as_by_one_process(two: Cluster, pocket: Any) -> None:
    one = interp.circuits.find(pocket, "ioi", "head_ablation", n=8)
    shared = two.circuit(pocket, "ioi", n=8)
    assert one.frame.equals(shared.frame) and one.notes == shared.notes
    assert one.search.forwards == shared.search.forwards
    assert one.provenance["fingerprint"] == shared.provenance["fingerprint"]
    assert shared.provenance["workers"]["workers"] == 2


@pytest.mark.slow
def test_tasks_and_heads_are_shared_out_together(
    two: Cluster, pocket: Any, saved: Counter[str], tmp_path: Path
) -> None:
    tasks = ["ioi", "greater_than"]
    truths = two.measured(pocket, tasks, n=8, resume=tmp_path)
    assert len(saved) == 32 and set(saved.values()) == {2}  # each head, once a task
    for task, truth in zip(tasks, truths, strict=True):
        alone = interp.circuits.measured(pocket, task, n=8)
        assert truth.heads == alone.heads and truth.effects == alone.effects
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ioi", "niah", "induction"])
def test_problems_are_judged_by_workers_as_by_one_process(
    two: Cluster, pocket: Any, task: str
) -> None:
    scope = "decode" if task == "induction" else "all"  # fed token by token
    settings: dict[str, Any] = dict(edits=[interp.edits.Ablate(["L2H3"], scope=scope)], n=20)
    told: list[tuple[int, int]] = []
    alone = interp.evaluate(pocket, task, **settings)
    shared = two.evaluate(
        pocket, task, progress=lambda done, total, _: told.append((done, total)), **settings
    )
    assert alone.frame.equals(shared.frame) and alone.notes == shared.notes
    assert (alone.baseline, alone.edited) == (shared.baseline, shared.edited)
    assert (alone.difference, alone.mcnemar) == (shared.difference, shared.mcnemar)
    assert alone.provenance["fingerprint"] == shared.provenance["fingerprint"]
    assert shared.provenance["workers"]["workers"] == 2
    assert [d for d, _ in told] == sorted(d for d, _ in told) and told[-1][0] == told[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_heads_are_ablated_by_workers_as_by_one_process(
    two: Cluster, pocket: Any, mode: str
) -> None:
    settings: dict[str, Any] = dict(mode=mode, task="ioi", n=16)
    alone = interp.ablate(pocket, "L2H3,L1H0", **settings)
    shared = two.ablate(pocket, "L2H3,L1H0", **settings)
    assert alone.frame.equals(shared.frame) and alone.draws == shared.draws
    assert alone.control_difference == shared.control_difference


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 12))
def test_ranges_hold_every_batch_once(sizes: list[int], most: int) -> None:
    found = ranges(sizes, most)
    assert [i for a, b in found for i in range(a, b)] == list(range(len(sizes)))
    assert len(found) <= most and all(a < b for a, b in found)


def test_losses_and_pictures_are_not_shared(pocket: Any) -> None:
    cluster = interp.cluster(workers=2)
    for settings in (dict(metric="loss"), dict(task="pope"), dict(task="lm_eval:arc_easy")):
        with pytest.raises(InputError, match="leave workers out"):
            cluster.evaluate(pocket, n=2, **settings)
    told = CliRunner().invoke(app, "evaluate --metric loss --workers 2 --n 2".split())
    assert told.exit_code == 2 and "leave workers out" in " ".join(told.output.split())
    assert cluster.pool is None


@pytest.mark.slow
def test_the_command_shares_a_scan_out(alone: interp.Atlas, tmp_path: Path) -> None:
    """A process of its own, from the words of the command line to the saved atlas."""
    words = "scan-heads --model llama --scores all --context 64 --samples 3 --workers 2 --out"
    done = subprocess.run(
        [sys.executable, "-c", "from interp.cli.main import main; main()", *words.split(),
         str(tmp_path / "a")],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    atlas = interp.Atlas.load(tmp_path / "a")
    assert atlas.provenance["workers"]["workers"] == 2 and atlas.provenance["workers"]["lost"] == 0
    assert list(atlas.frame.columns) == list(alone.frame.columns)
    columns = alone.frame.select_dtypes("number").columns  # threads are the machine's to choose
    np.testing.assert_allclose(atlas.frame[columns], alone.frame[columns], atol=1e-5, rtol=1e-4)


def test_methods_that_are_not_shared_are_refused(pocket: Any) -> None:
    with pytest.raises(InputError, match="the method is eap"):
        interp.cluster(workers=2).circuit(pocket, "ioi", "eap", n=8)
    told = CliRunner().invoke(app, "circuit --task ioi --method eap --workers 2".split())
    assert told.exit_code == 2 and "the method is eap" in " ".join(told.output.split())


@pytest.mark.slow
def test_a_model_that_was_changed_after_it_was_loaded_is_refused(two: Cluster) -> None:
    changed = interp.load("llama", device="cpu")
    next(changed.module.parameters()).data[0, 0] += 1
    with pytest.raises(WorkerError, match="would measure something else"):
        two.scan_heads(changed, "sink", progress=False, context=32, samples=1)


def test_models_that_workers_could_not_have_are_refused(worded: Any, pocket: Any) -> None:
    cluster = interp.cluster(workers=2)
    with pytest.raises(InputError, match="came as an object"):
        cluster.scan_heads(worded("llama")[0], "sink", progress=False, context=32, samples=1)
    with (
        pocket.edit(interp.edits.Ablate(["L0H0"])),
        pytest.raises(InputError, match="do not reach its workers"),
    ):
        cluster.scan_heads(pocket, "sink", progress=False, context=32, samples=1)
    with pytest.raises(InputError, match="came as an object"):
        cluster.evaluate(worded("llama")[0], "induction", n=2, force=True)
    assert cluster.pool is None  # nothing was started for that


@pytest.mark.parametrize("given", [dict(workers=0), dict(workers=1.5), dict(threads=0)])
def test_counts_that_can_not_be(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        interp.cluster(**given)


def test_without_ray_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.support.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"interp\[ray\]"):
        interp.cluster(workers=2)


def test_an_address_where_nothing_listens_is_told_soon(pocket: Any) -> None:
    with (
        interp.cluster(address="127.0.0.1:9") as cluster,
        pytest.raises(InputError, match=r"No Ray cluster answers at 127\.0\.0\.1:9"),
    ):
        cluster.scan_heads(pocket, "sink", progress=False, context=32, samples=1)


def test_progress_never_goes_back() -> None:
    told: list[int] = []
    report = onwards(lambda done, total, what: told.append(done))
    assert report is not None
    for done in (0, 3, 1, 3, 2, 5):
        report(done, 5, "")
    assert told == [0, 3, 3, 5]
