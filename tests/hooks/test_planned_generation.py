"""Under the tap a decode step through the kernels is validated once a kind of layer, not once a
token."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from prompts import tokens

pytest.importorskip("triton")

from interp.edits import ScaleHeads, ZeroTuning
from interp_hooks import hook
from interp_kernels import dispatch
from interp_kernels.fused import plans
from interp_kernels.fused.primitives import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="asks for the kernels on the CPU")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_steps_after_the_first_are_planned(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hook(tiny.build(name), name=name, backend="triton")
    made: list[int] = []
    prepare = dispatch.prepare

    def counted(q: Any, *args: Any, **given: Any) -> Any:
        made.append(q.shape[2])
        return prepare(q, *args, **given)

    monkeypatch.setattr(dispatch, "prepare", counted)
    plans.forget()
    given = dict(input_ids=tokens(length=9)[:1], do_sample=False, max_new_tokens=8)
    more = dict(eos_token_id=None, pad_token_id=0, cache_implementation=kind, disable_compile=True)
    edits = [ScaleHeads({"0.1": 0.5, "1.1": 2.0}), ZeroTuning(2.0)]
    outs = []
    for edit in edits:
        with model.edit(edit), model.observe("entropy", "max"):
            outs.append(model.generate(**given, **more))
    steps = made.count(1)
    # a plan a kind of layer (window or none), edit and question; 2 edits × 7 steps × 2 layers
    assert 0 < steps <= 8, steps
    plans.forget()
    with model.edit(edits[-1]), model.observe("entropy", "max"):
        monkeypatch.setattr(plans, "MOST", 1)
        assert torch.equal(model.generate(**given, **more), outs[-1])
