"""Which GPUs the kernels accept, and what happens where one of them does not run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from interp_kernels import BackendError, Mask, Request, Rule, Steer, attention, dispatch, explain
from interp_kernels.fused import backend, capable, configs
from interp_kernels.fused import decode_launch as decode_module
from interp_kernels.fused import forward as forward_module
from interp_kernels.fused import merge as merge_module
from interp_kernels.fused import received as received_module
from interp_kernels.fused.configs import Config
from interp_kernels.request import Received

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    capable.forget()
    yield
    capable.forget()


@pytest.mark.parametrize(
    ("hip", "capability", "word"),
    [
        (None, (8, 0), ""),
        (None, (8, 6), ""),
        (None, (8, 9), ""),
        (None, (9, 0), ""),
        (None, (10, 0), ""),
        (None, (12, 0), ""),
        (None, (7, 5), "compute capability 8.0 .A100. or newer, and this GPU has 7.5"),
        (None, (7, 0), "has 7.0"),
        ("6.4.1", (9, 4), "built for AMD .HIP 6.4.1."),
        ("7.1", (11, 0), "built for AMD"),
    ],
)
def test_gpus(hip: str | None, capability: tuple[int, int], word: str) -> None:
    why = capable.of_capability(hip, capability)
    if not word:
        assert not why
    else:
        with pytest.raises(ValueError, match=word):
            raise ValueError(why)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.9.0", True),
        ("3.9.0+git1234", True),
        ("3.10.0", False),
        ("4.0.0", False),
        ("main", False),
    ],
)
def test_versions_of_triton(version: str, fits: bool) -> None:
    why = capable.of_triton(version)
    assert (not why) == fits
    assert fits or f"Triton {version} is installed" in why


def test_the_installed_triton_is_one_of_them() -> None:
    import triton

    assert not capable.of_triton(triton.__version__)


def test_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `explain`, by the error of a backend asked for, by `check_backend`."""
    q = torch.randn(1, 1, 20, 16)
    monkeypatch.setattr(dispatch, "_on_gpu", lambda call: True)
    assert explain(q, q, q).startswith("triton: ")
    for name, value in (("TRITON", ((3, 0), (3, 1))), ("INTERPRETED", False)):
        with monkeypatch.context() as patch:
            patch.setattr(capable, name, value)
            capable.of_triton.cache_clear()
            why = capable.usable(q.device)
            assert why
            assert explain(q, q, q).endswith(f"; not triton: {why}")
            with pytest.raises(BackendError, match=r"is installed|needs a CUDA GPU"):
                attention(q, q, q, backend="triton")
            with pytest.raises(BackendError, match="not available here"):
                dispatch.check_backend("triton")
        capable.of_triton.cache_clear()


def test_a_gpu_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 7)
    monkeypatch.setattr(capable, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: (7, 5))
    capable._of_device.cache_clear()
    assert "has 7.5" in backend.usable(device)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    capable._of_device.cache_clear()
    assert "AMD" in backend.usable(device)
    capable._of_device.cache_clear()


class Broken:
    """A kernel whose launch raises."""

    def __init__(self, error: Exception) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            raise self.error

        return launch


TOO_MUCH = OutOfResources(262144, 232448, "shared memory")
KINDS = [
    TOO_MUCH,
    PTXASError("`ptxas` stderr: something"),
    RuntimeError("PassManager::run failed"),
]
WHERE: list[tuple[Any, str, dict[str, Any]]] = [
    (forward_module, "forward_kernel", {"request": Request(frozenset({"entropy"}))}),
    (received_module, "received_kernel", {"request": Request(received={"all": Received()})}),
    (merge_module, "merge_kernel", {"steer": Steer(gain=torch.full((1, 2, 1), 0.5))}),
    (
        merge_module,
        "merge_kernel",
        {
            "steer": Steer(
                labels=torch.arange(20)[None, None] % 2,
                rule=Rule(torch.tensor([[1.0, 0.4]]), torch.tensor([[1.0, 0.0]])),
            )
        },
    ),
]


def case(lq: int = 20) -> list[Tensor]:
    torch.manual_seed(lq)
    return [torch.randn(1, h, n, 16) for h, n in ((2, lq), (1, 20), (1, 20))]


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("module", "name", "settings"), WHERE)
def test_what_does_not_run_is_answered_by_the_streaming_route(
    module: Any, name: str, settings: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right, with a warning the first time, and not tried again."""
    q, k, v = case()
    monkeypatch.setattr(dispatch, "_on_gpu", lambda call: True)
    monkeypatch.setattr(module, name, broken := Broken(error))
    want = attention(q.double(), k.double(), v.double(), backend="reference", **settings)
    for turn in range(3):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            got = attention(q, k, v, **settings)
        said = [str(one.message) for one in heard if issubclass(one.category, RuntimeWarning)]
        assert len(said) == (turn == 0), said
        assert turn or type(error).__name__ in said[0]
        torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=1e-5)
        assert got.stats.keys() == want.stats.keys()
    assert broken.launches == 1
    line = explain(q, k, v, **settings)
    assert line.startswith("streaming: ")
    assert "does not run on this device" in line
    with pytest.raises(BackendError, match="does not run on this device"):
        attention(q, k, v, backend="triton", **settings)
    assert broken.launches == 1
    # another configuration is tried by itself
    with pytest.warns(RuntimeWarning, match="streaming way"):
        attention(q, k, v, mask=Mask(window=5), **settings)
    assert broken.launches == 2


def test_decode_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = case(1)
    monkeypatch.setattr(dispatch, "_on_gpu", lambda call: True)
    monkeypatch.setattr(decode_module, "split_kernel", broken := Broken(TOO_MUCH))
    want = attention(q, k, v, mask=Mask(q_start=19), backend="reference").out
    with pytest.warns(RuntimeWarning, match="OutOfResources"):
        torch.testing.assert_close(attention(q, k, v, mask=Mask(q_start=19)).out, want)
    # a longer cache is the same configuration
    longer = torch.cat([k, k], 2), torch.cat([v, v], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, *longer, mask=Mask(q_start=39))
    assert broken.launches == 1


def test_asked_for_by_name_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = case()
    monkeypatch.setattr(forward_module, "forward_kernel", Broken(TOO_MUCH))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"does not run on this device .OutOfResources"):
            attention(q, k, v, backend="triton")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("something else"),
    ],
)
def test_other_errors_are_not_swallowed(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = case()
    monkeypatch.setattr(dispatch, "_on_gpu", lambda call: True)
    monkeypatch.setattr(forward_module, "forward_kernel", broken := Broken(error))
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)[:12]):
            attention(q, k, v)
    assert broken.launches == 2


def test_tuning_leaves_out_what_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.testing

    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(configs, "_FASTEST", {})
    monkeypatch.setenv("INTERP_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run())
    times = {16: 3.0, 32: 2.0}

    def run(config: Config) -> float:
        if config.rows not in times:
            raise PTXASError("`ptxas` failed") if config.rows > 64 else TOO_MUCH
        return times[config.rows]

    made = {rows: Config(rows, 16, 4, 2) for rows in (16, 32, 64, 128)}
    candidates = tuple(made.values())
    assert configs.tuned("a", made[16], candidates, run) == made[32]
    times.clear()
    assert configs.tuned("b", made[16], candidates, run) == made[16]
