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


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_scales_of_any_sign(scale: float, causal: bool, sinks: bool) -> None:
    """A causal call of PyTorch's kernel with a scale that is not positive gives NaN."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3)
    logits = scale * q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2)
    if causal:
        logits = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    given = torch.randn(6) if sinks else None
    if given is not None:
        logits = torch.cat([logits, given.double().view(1, 6, 1, 1).expand(-1, -1, 5, 1)], -1)
    weights = logits.softmax(-1)[..., :5]
    wanted = weights @ v.double().repeat_interleave(3, 1)
    for backend in ("streaming", "reference"):
        found = attention(q, k, v, scale=scale, sinks=given, mask=Mask(causal), backend=backend)
        torch.testing.assert_close(found.out.double(), wanted, atol=1e-5, rtol=1e-4)


def test_what_no_call_can_mean_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="no samples"):
        attention(q[:0], q[:0], q[:0])
    with pytest.raises(ValueError, match="topk"):
        attention(q, q, q, request=Request(topk=10**9))
    with pytest.raises(ValueError, match="scale"):
        attention(q, q, q, scale=1e30)


def test_no_keys() -> None:
    """Rows that see nothing at all have weight 0 everywhere, and no largest key."""
    q, k = torch.randn(2, 4, 3, 8), torch.zeros(2, 2, 0, 8)
    asked = Request(frozenset({"max", "argmax", "entropy"}), topk=2)
    for backend in ("reference", "streaming"):
        found = attention(q, k, k, mask=Mask(False), request=asked, backend=backend)
        assert bool((found.stats["argmax"] == -1).all()) and not found.out.any()
        assert not found.stats["max"].any() and not found.stats["entropy"].any()
