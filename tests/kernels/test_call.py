"""interp_kernels.call: a call is validated and made ready once, whatever computes it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from interp_kernels import Mask, Request, Rule, Steer, attention, compose, explain
from interp_kernels.call import Call, prepare
from interp_kernels.masking import Visibility

RULE = Rule(torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
EDITS = [Steer(spans=((0, 1, 1),), rule=RULE), Steer(gain=torch.full((1, 1, 1), 2.0))]


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, n, 16, generator=generator) for h, n in ((4, 2), (2, 9), (2, 9)))


@pytest.mark.parametrize("backend", ["reference", "streaming", "triton"])
@pytest.mark.parametrize("run", [attention, explain])
@pytest.mark.parametrize("request_", [None, Request(frozenset({"entropy"}))])
def test_mask_and_edits_are_made_ready_once(
    backend: str, run: Any, request_: Request | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = {"fuse": 0, "visibility": 0}
    fuse, init = compose.fuse, Visibility.__init__

    def counted_fuse(*given: Any) -> Any:
        count["fuse"] += 1
        return fuse(*given)

    def counted_init(self: Visibility, *given: Any) -> None:
        count["visibility"] += 1
        init(self, *given)

    monkeypatch.setattr(compose, "fuse", counted_fuse)
    monkeypatch.setattr(Visibility, "__init__", counted_init)
    q, k, v = tensors()
    run(q, k, v, mask=Mask(q_start=7), steer=EDITS, request=request_, backend=backend)
    assert count == {"fuse": int(backend != "reference"), "visibility": 1}


def test_a_call_is_frozen_and_replaced() -> None:
    q, k, v = tensors()
    call = prepare(q, k, v, mask=Mask(q_start=7), steer=EDITS)
    assert (call.scale, call.group, len(call.steers)) == (0.25, 2, 1)
    assert call.segments == [(0, 1, 1), (1, 9, 0)]
    other: Call = replace(call, steers=())
    assert other.segments == [(0, 9, 0)] and other.vis is call.vis
    with pytest.raises(FrozenInstanceError):
        call.scale = 1.0  # type: ignore[misc]


def test_a_setting_that_does_not_exist_is_an_error() -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError, match="temperature"):
        attention(q, k, v, temperature=2.0)  # type: ignore[call-arg]
