"""A thousand blocks and ten thousand generated tokens leave nothing behind: no hook, tensor,
attribute, entry of a module's table, thread or open file, whatever was raised inside."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import interp
from interp_hooks import HookedModel, LiveEdit, hook

OURS = ("interp", "interp_hooks", "interp_kernels")
IDS = torch.arange(3, 15)[None]


class Boom(Exception):
    pass


class Explode(LiveEdit):
    """Raises in the middle of a forward."""

    def touches(self, call: Any) -> bool:
        raise Boom


def tables() -> dict[str, int]:
    """How much every table in a module of ours holds, and every cache of a function."""
    sizes = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in OURS or module is None:
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, dict | list | set) and key[:2] != "__":
                sizes[f"{name}.{key}"] = len(value)
            elif callable(getattr(value, "cache_info", None)):
                sizes[f"{name}.{key}()"] = value.cache_info().currsize
    return sizes


def shape_of(module: torch.nn.Module) -> list[Any]:
    """Every hook and attribute of every module, by number and name."""
    lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, sorted(vars(m)), type(m), [len(getattr(m, kind)) for kind in lists])
        for name, m in module.named_modules()
    ]


def held() -> dict[str, Any]:
    """What the process holds now."""
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    descriptors = Path("/proc/self/fd")
    files = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    return {"tensors": tensors, "files": files, "threads": threading.active_count(), **tables()}


def resident() -> float:
    """Megabytes of the process in memory, after the allocator gave back what it could."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    return hook(tiny.build(request.param), name=request.param)


def quietly(work: Callable[[], Any]) -> None:
    with suppress(Boom):
        work()


def cycle(model: HookedModel) -> None:
    """Every kind of block once, and once with an error inside."""
    ablate = interp.edits.Ablate(["L0H1"])
    blocks: list[Callable[[], Any]] = [
        lambda: model.edit(ablate, interp.edits.ScaleHeads({"L1H2": 0.5})),
        lambda: model.observe("entropy", "max"),
        lambda: model.capture_z(),
        lambda: model.capture_resid(),
        lambda: model.activations("pre", "z", write=lambda place, layer, tensor: None),
        lambda: model.block_outputs(),
        lambda: model.projections(lambda place, layer, tensor: None),
        lambda: model.clean(),
    ]
    for block in blocks:
        with block():
            model.logits(IDS)

        def fail(block: Callable[[], Any] = block) -> None:
            with block():
                model.logits(IDS)
                raise Boom

        quietly(fail)

    def nested() -> None:
        with model.edit(ablate), model.observe("entropy"), model.edit(Explode()):
            model.logits(IDS)

    quietly(nested)
    for inputs in ({}, {"no_such_input": 1}):
        # the second is a forward that the model refuses
        with suppress(Exception), model.edit(ablate):
            model(input_ids=IDS, **inputs)


def leaves_nothing(
    model: HookedModel, work: Callable[[], Any], times: int, megabytes: float
) -> None:
    work()  # what is made once is made
    shape, before, memory = shape_of(model.module), held(), resident()
    logits = model.logits(IDS)
    for _ in range(times):
        work()
    assert shape_of(model.module) == shape
    assert model.observers_and_edits() == ([], [])
    assert torch.equal(model.logits(IDS), logits)
    del logits
    after = held()
    assert {k: (before.get(k), v) for k, v in after.items() if v != before.get(k)} == {}
    grown = resident() - memory
    assert grown < megabytes, f"{grown:.1f} MB more"


def generate(model: HookedModel) -> None:
    """100 tokens, watched and edited."""
    with model.edit(interp.edits.ScaleHeads({"L1H2": 0.5})), model.observe("entropy"):
        ids = model.generate(input_ids=IDS, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    assert ids.shape[1] == IDS.shape[1] + 100


def test_a_few_blocks_leave_nothing(model: HookedModel) -> None:
    leaves_nothing(model, lambda: cycle(model), 1, 32)


@pytest.mark.slow
def test_a_thousand_blocks_leave_nothing(model: HookedModel) -> None:
    leaves_nothing(model, lambda: cycle(model), 1000 // 18, 32)  # 18 blocks a cycle


@pytest.mark.slow
def test_ten_thousand_tokens_leave_nothing(model: HookedModel) -> None:
    leaves_nothing(model, lambda: generate(model), 100, 32)


@pytest.mark.slow
def test_loading_and_dropping_models_leaves_nothing(model: HookedModel) -> None:
    """A handle and its model go when nobody holds them."""

    def load() -> None:
        handle = hook(tiny.build("llama"), name="again")
        with handle.edit(interp.edits.Ablate(["L0H1"])):
            handle.logits(IDS)

    leaves_nothing(model, load, 20, 32)
