"""SEKA against models whose keys are changed by a plain hook before they are rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from prompts import inputs_for, left_padded, tokens
from test_edits_models import stepwise

from interp import edits as E
from interp.errors import EditError, HeadError
from interp_hooks import HookedModel, hook
from interp_hooks.huggingface.rotations import rotations

Tapped = Callable[[str], tuple[HookedModel, Any]]
#: which module gives the keys that are rotated next, or not at all
KEYS = {
    "llama": "k_proj", "gpt2": "c_attn", "qwen2": "k_proj", "qwen3": "k_norm", "gemma2": "k_proj",
    "mistral": "k_proj", "gpt_oss": "k_proj", "phi3": "qkv_proj", "olmo2": "k_norm",
    "neox": "query_key_value", "opt": "k_proj", "gemma3": "k_norm",
}  # fmt: skip
HEADS = ["0.1", "1.0"]
MATRICES = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(3))
SPAN, GAIN = (2, 6), 0.7


@contextmanager
def hooked(plain: Any, name: str, where: torch.Tensor) -> Iterator[None]:
    """k ← k + g M k at the tokens `where` (batch, tokens), by a hook of the module that gives k."""

    def change(layer: int) -> Callable[..., torch.Tensor]:
        head, matrix = int(HEADS[layer][2:]), MATRICES[layer]

        def moved(k: torch.Tensor) -> torch.Tensor:  # (batch, tokens, d)
            new = k.double() + GAIN * k.double() @ matrix.double().T
            return torch.where(where[..., None], new.to(k), k)

        def at(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            new = out.clone()
            if out.ndim == 4 and name == "gemma3":  # (batch, kv_heads, tokens, d)
                new[:, head] = moved(out[:, head])
            elif out.ndim == 4:  # (batch, tokens, kv_heads, d)
                new[:, :, head] = moved(out[:, :, head])
            else:
                start = {"gpt2": 32, "phi3": 32, "neox": 8 + 16 * head}.get(name, 0) + 8 * head
                new[..., start : start + 8] = moved(out[..., start : start + 8])
            return new

        return at

    with ExitStack() as stack:
        for layer, attention in enumerate(tiny.layers(plain)):
            module = getattr(attention, KEYS[name])
            stack.callback(module.register_forward_hook(change(layer)).remove)
        yield


def edit(keys: Any = SPAN) -> E.SEKA:
    return E.SEKA(keys, HEADS, MATRICES, GAIN)


@torch.no_grad()
def logits(
    model: HookedModel, ids: torch.Tensor, mask: torch.Tensor, run: Any = None
) -> torch.Tensor:
    return (run or model)(**inputs_for(model, ids, mask)).logits


@pytest.mark.parametrize("name", KEYS)
def test_it_is_what_a_changed_projection_gives(tapped: Tapped, name: str) -> None:
    model, plain = tapped(name)
    ids, mask = tokens(), left_padded(True)
    real, untouched = mask.bool(), logits(model, ids, mask)
    token = torch.arange(mask.shape[1]) - mask.int().argmax(1)[:, None]
    with hooked(plain, name, (token >= SPAN[0]) & (token < SPAN[1])):
        wanted = logits(model, ids, mask, plain)
    with torch.no_grad(), model.edit(edit()):
        found, steps = logits(model, ids, mask), stepwise(model, ids, mask)
    assert float((wanted - untouched)[real].abs().max()) > 1e-2
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(steps[real], wanted[real], atol=2e-4, rtol=2e-4)
    assert torch.equal(logits(model, ids, mask), untouched)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_positions_are_those_of_the_forward(tapped: Tapped, name: str) -> None:
    """Given ones, far from 0; and those that the model counts itself, padding among them."""
    model, plain = tapped(name)
    ids, mask = tokens(), left_padded(True)
    marks = torch.zeros_like(mask, dtype=torch.bool)
    marks[:, 4:8] = True
    far = torch.arange(ids.shape[1])[None].expand_as(ids) + 77
    for given in (dict(position_ids=far), {}):
        inputs = dict(input_ids=ids, attention_mask=mask, **given)
        with torch.no_grad(), hooked(plain, name, marks):
            wanted = plain(**inputs).logits
        with torch.no_grad(), model.edit(edit(marks)):
            found = model(**inputs).logits
        real = mask.bool()
        torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    with torch.no_grad(), pytest.raises(EditError, match="rise by one"), model.edit(edit(marks)):
        model(input_ids=ids, position_ids=2 * far - 80)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "neox", "gemma3"])
def test_turns_are_the_model_s_rotation(tapped: Tapped, name: str) -> None:
    """T_p of the cosines and sines that the model's own rotary module gives."""
    model, plain = tapped(name)
    places = torch.tensor([0, 1, 7, 90, 127])
    for layer in range(2):
        wanted = tiny.turns(plain, layer, places)
        found = rotations(model).at(layer, places)
        assert found is not None
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert rotations(tapped("gpt2")[0]).at(0, places) is None


def test_half_precision_and_beams() -> None:
    plain = tiny.build("llama").bfloat16()
    model, twin = hook(plain), tiny.eager(plain)
    ids, mask = tokens(), left_padded(False)
    token = torch.arange(mask.shape[1]).expand_as(mask)
    with hooked(twin, "llama", (token >= SPAN[0]) & (token < SPAN[1])):
        wanted = logits(model, ids, mask, twin).float()
    untouched = logits(model, ids, mask).float()
    with model.edit(edit()):
        found = logits(model, ids, mask).float()
    assert float((found - wanted).norm()) < 0.1 * float((wanted - untouched).norm())
    several = dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=4)
    marks = torch.zeros_like(mask, dtype=torch.bool)
    marks[0, 2:6] = True
    wide = hook(tiny.build("llama"))
    with torch.no_grad(), wide.edit(edit(marks)):
        out = wide.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **several)
    other = wide.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **several)
    assert torch.equal(out[2:], other[2:]) and not torch.equal(out[:2], other[:2])


def test_its_file(tmp_path: Path) -> None:
    path = E.save(tmp_path / "seka.json", [edit(E.Span("the instruction"))])
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    (again,) = E.load(path)
    assert isinstance(again, E.SEKA) and torch.equal(again.matrices, MATRICES)
    assert [str(h) for h in again.heads] == ["L0H1", "L1H0"] and again.gain == GAIN
    assert again.keys == E.Span("the instruction")


def test_what_it_refuses(tapped: Tapped) -> None:
    model, _ = tapped("llama")
    for heads, matrices in (
        (HEADS, MATRICES[:1]), (["0.1", "L0H1"], MATRICES), (HEADS, MATRICES[:, :4]),
        (HEADS, MATRICES * float("inf")), (HEADS, "x"), (HEADS, torch.ones(2, 8, 8).int()),
    ):  # fmt: skip
        with pytest.raises(EditError):
            E.SEKA(SPAN, heads, matrices)
    with pytest.raises(EditError, match="names its KV heads"):
        E.SEKA(SPAN, None, MATRICES)
    with pytest.raises(HeadError, match="no KV head L0H2"), model.edit(
        E.SEKA(SPAN, ["0.2"], MATRICES[:1])
    ):  # fmt: skip
        pass
    with pytest.raises(HeadError, match="no KV head L7H0"), model.edit(
        E.SEKA(SPAN, ["7.0"], MATRICES[:1])
    ):  # fmt: skip
        pass
    with pytest.raises(EditError, match="keys of 4 numbers"), model.edit(
        E.SEKA(SPAN, ["0.0"], torch.eye(4)[None])
    ):  # fmt: skip
        pass
