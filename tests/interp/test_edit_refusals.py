"""What edits and kernels refuse is an `EditError` of one sentence, also inside a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from interp.edits import Gate, SigmoidAttention, Streaming
from interp.errors import EditError
from interp_hooks import HookedModel

Tapped = Callable[[str], tuple[HookedModel, Any]]


def test_edits_that_cannot_act_together(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    both = SigmoidAttention(-2.0), SigmoidAttention(-1.0)
    with (
        pytest.raises(EditError, match=r"can't act as they are at layer 0: steer\.sigmoid"),
        model.edit(*both),
    ):
        model.logits(torch.arange(6)[None])
    assert torch.isfinite(model.logits(torch.arange(6)[None])).all()


@pytest.mark.parametrize("sink", [True, 1.5, -1, 2**41])
def test_sizes_are_whole_numbers(sink: Any) -> None:
    for make in (lambda: Streaming(sink, 4), lambda: Gate(0.5, sink, 4)):
        with pytest.raises(EditError, match="takes sink tokens from 0"):
            make()
