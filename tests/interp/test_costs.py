"""What a scan will cost: counted against models, plans and brute force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scale_table
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import interp
from interp.cli.main import app
from interp.costs.fit import fit
from interp.costs.machines import cpu, features, h200, working
from interp.costs.passes import passes_of
from interp.costs.scan_cost import _shared
from interp.costs.shape import Shape, of_config, shape_of
from interp.errors import InputError, ModelError


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss", "neox", "opt", "qwen3"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    module = tiny.build(name)
    shape = of_config(module.config, name)
    assert shape.parameters == sum(p.numel() for p in module.parameters())
    assert (shape.layers, shape.heads) == (2, 4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_products_are_those_that_torch_counts(name: str) -> None:
    """Floating-point operations of a forward, less those of attention (all pairs, as PyTorch counts
    them) and of the unembedding."""
    module, n = tiny.eager(tiny.build(name)), 24
    shape = of_config(module.config, name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(input_ids=torch.arange(n)[None], use_cache=False)
    attention = 4 * shape.d_head * shape.heads * shape.layers * n * n
    unembedding = 2 * n * shape.width * shape.vocabulary
    assert features(shape, n)[0] == pytest.approx(
        counter.get_total_flops() - attention - unembedding, rel=0.01
    )


def test_of_experts_those_count_that_are_chosen() -> None:
    config = tiny.CONFIGS["gpt_oss"](101)
    whole = of_config(tiny.build("gpt_oss").config, "moe")
    config.num_experts_per_tok = config.num_local_experts
    every = of_config(config, "moe")
    assert whole.parameters == every.parameters and whole.products < every.products


@given(
    st.integers(1, 40),
    st.lists(st.one_of(st.none(), st.integers(1, 50)), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_pairs_are_those_that_a_query_sees(
    tokens: int, windows: list[int | None], heads: int
) -> None:
    shape = Shape("drawn", heads, heads, 8, 32, 64, tuple(windows), 1, 1, 10)
    seen = sum(
        1
        for window in windows
        for query in range(tokens)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    assert shape.pairs(tokens) == heads * seen


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=7), st.integers(1, 3))
def test_workers_are_near_the_best_way_to_share(units: list[float], copies: int) -> None:
    best = float("inf")
    for which in np.ndindex(*[copies] * len(units)):
        loads = np.bincount(which, weights=units, minlength=copies)
        best = min(best, float(loads.max()))
    assert best - 1e-9 <= _shared(units, copies) <= 4 / 3 * best + 1e-9


def test_a_fit_finds_what_was_put_in_and_tells_its_error() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 5, (12, 3)) * [1e9, 1.0, 1e-3]
    y = x @ np.array([2e-9, 0.0, 7e3])
    found = fit(x.tolist(), y.tolist())
    assert found.coefficients == pytest.approx((2e-9, 0.0, 7e3), rel=1e-6, abs=1e-9)
    assert found.error < 1e-6
    y[3] *= 2  # what the others can't tell
    assert fit(x.tolist(), y.tolist()).error > 0.3


def test_a_plan_knows_the_forwards_of_a_scan(pocket: Any) -> None:
    context, samples = 256, 4
    passes, notes = passes_of("default", context, samples)
    plan = interp.plan_scan(pocket, context=context, samples=samples)
    batches = {k: [b.input_ids for b in v] for k, v in plan._batches.items()}
    by_what = {p.what: p for p in passes}
    text = by_what["running text"]
    assert [tuple(b.shape) for b in batches["text"]] == [(1, text.tokens)] * text.rows
    needles = sorted(p.tokens for p in passes if p.what == "needles" for _ in range(p.rows))
    real = sorted(b.shape[1] for b in batches["needle"])
    assert len(needles) == len(real)
    assert all(0.8 * told <= n <= told for told, n in zip(needles, real, strict=True))
    assert abs(batches["repeat"][0].shape[1] - by_what["repeated random tokens"].tokens) <= 1
    assert not notes and passes_of("importance", 256, 4)[1]


@pytest.mark.parametrize("machine", [cpu, h200])
def test_longer_texts_larger_models_and_statistics_cost_more(machine: Any) -> None:
    small, large = (scale_table.shape(name) for name in ("8B", "70B"))
    for watched in (False, True):
        times = [machine().forward(small, n, watched)[1] for n in (1024, 8192, 131072)]
        assert times == sorted(times)
        assert machine().forward(large, 8192, watched)[1] > times[1]
    assert machine().forward(small, 8192, True)[1] >= machine().forward(small, 8192, False)[1]
    low, high = machine().forward(small, 8192, True)
    assert 0 < low < high


def test_the_fit_tells_the_benchmarks_within_its_error() -> None:
    """Each committed forward of pocket-llama lies between the seconds told for it."""
    shape = shape_of("llama")
    rows = json.loads(Path("kernels/benchmarks/results/cpu.json").read_text())["rows"]
    mine = [r for r in rows if r["model"] == "pocket-llama"]
    for row in mine:
        for watched, kind in ((False, "plain"), (True, "full")):
            low, high = cpu().forward(shape, row["length"], watched)
            assert low <= row[kind]["seconds"] <= high
    assert 0 < working().error < 0.5


def test_what_does_not_fit_is_said_and_chunks_help() -> None:
    large = scale_table.shape("405B")
    whole = interp.scan_cost(large, 1 << 20, gpus=8)
    part = interp.scan_cost(large, 1 << 20, gpus=8, chunk=8192)
    assert part.bytes_working < 0.1 * whole.bytes_working
    assert whole.gpus_a_copy > part.gpus_a_copy > 8
    assert any("offloaded" in note for note in part.notes)
    assert any("at most" in note for note in part.notes)  # of its positions
    more = interp.scan_cost(large, 1 << 20, gpus=64, chunk=8192)
    assert more.copies > 1 and more.seconds[0] < part.seconds[0]


def test_of_the_command_line(tmp_path: Path) -> None:
    config = tiny.build("llama").config
    config.save_pretrained(tmp_path)
    told = CliRunner().invoke(
        app, ["plan", str(tmp_path / "config.json"), "--context", "64", "--gpus", "2", "--json"]
    )
    assert told.exit_code == 0, told.output
    said = json.loads(told.stdout)
    assert said["copies"] == 2 and said["seconds"][0] < said["seconds"][1]
    shown = CliRunner().invoke(app, ["plan", "llama", "--context", "256", "--samples", "2"])
    assert shown.exit_code == 0 and re.search(r"running text\s+256 × 2", shown.output)
    missing = CliRunner().invoke(app, ["plan", "nobody-here"])
    assert missing.exit_code == 2


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(ModelError, match="can't be had"):
        interp.scan_cost(str(tmp_path))
    with pytest.raises(InputError, match="at least 32 tokens"):
        interp.scan_cost("llama", context=8)
    with pytest.raises(InputError, match="dtype"):
        interp.scan_cost("llama", dtype="int3")


def test_a_model_that_draws_has_no_scan_to_plan() -> None:
    with pytest.raises(ModelError, match="draws pictures"):
        interp.scan_cost("dit")
