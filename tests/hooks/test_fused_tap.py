"""observe, edit and generate through the kernels equal the streaming backend, on real
architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

from interp import edits
from interp_hooks import HookedModel, hook
from interp_kernels import explain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: plain; grouped keys, windows and soft-caps; sinks; learned positions
NAMES = ["llama", "gemma2", "gpt_oss", "mistral", "gpt2"]
ASKED = ("entropy", "max", "argmax", "distance", "received", "group_mass")


@pytest.fixture(scope="module")
def both() -> Callable[[str], tuple[HookedModel, HookedModel]]:
    """name → the model through the kernels, and the same weights through PyTorch."""
    made: dict[str, tuple[HookedModel, HookedModel]] = {}

    def get(name: str) -> tuple[HookedModel, HookedModel]:
        if name not in made:
            module = tiny.build(name).to(DEVICE)
            # on a GPU `auto` must take the kernels by itself
            fused = hook(module, name=name, backend="auto" if DEVICE == "cuda" else "triton")
            made[name] = fused, hook(module, name=name, backend="streaming")
        return made[name]

    return get


def inputs(length: int, side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(length)).to(
        DEVICE
    )
    mask = torch.ones_like(ids)
    if side:
        mask[1, slice(None, 5) if side == "left" else slice(length - 5, None)] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_observed_and_edited_alike(both: Any, name: str, side: str) -> None:
    given = inputs(21, side)
    labels = torch.randint(-1, 3, (2, 21), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    change = edits.ScaleHeads({"0.1": 0.0, "1.2": 2.5})
    seen, logits = [], []
    for model in both(name):
        with torch.no_grad(), model.observe(*ASKED, labels=labels) as record, model.edit(change):
            logits.append(model(**given).logits)
        seen.append(record)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits[0][real], logits[1][real], atol=1e-4, rtol=1e-4)
    for layer in range(2):
        for statistic in ASKED:
            got, want = (record[layer][statistic].float() for record in seen)
            tolerance = 1e-3 if statistic == "distance" else 1e-4
            torch.testing.assert_close(
                got, want, atol=tolerance, rtol=tolerance, msg=f"layer {layer} {statistic}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generates_alike(both: Any, name: str) -> None:
    """Prefill, then decode steps by the split kernel: the same tokens, the same strongest keys."""
    given = inputs(18, "left")
    out, top = [], []
    for model in both(name):
        with torch.no_grad(), model.observe("argmax", "max") as record:
            out.append(model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0))
        top.append(record)
    assert torch.equal(out[0], out[1])
    for layer in range(2):
        assert torch.equal(top[0][layer].argmax, top[1][layer].argmax)
        torch.testing.assert_close(top[0][layer].max, top[1][layer].max, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_cuda() -> None:
    x = torch.randn(1, 2, 40, 16, device="cuda")
    assert explain(x, x, x).startswith("triton: ")
