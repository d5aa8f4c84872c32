"""SEKA against models whose keys are changed by a plain hook before they are rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from prompts import inputs_for, left_padded, tokens
from test_edits_models import stepwise

from interp import edits as E
from interp.errors import EditError, HeadError, InputError, InterpError
from interp.inputs.relevance import Passage, passages
from interp_hooks import HookedModel, hook
from interp_hooks.errors import TapError
from interp_hooks.huggingface.rotations import Rotations, rotations

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


@torch.no_grad()
def projected(plain: Any, name: str, ids: list[int]) -> list[torch.Tensor]:
    """(tokens, n) float64 of each layer: what the module that gives keys gives."""
    keys: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: torch.Tensor) -> None:
        keys.append(out[0].double())

    with ExitStack() as stack:
        for attention in tiny.layers(plain):
            module = getattr(attention, KEYS[name])
            stack.callback(module.register_forward_hook(keep).remove)
        plain(input_ids=torch.tensor([ids]))
    return keys


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fitted_projectors_are_those_of_the_projections(worded: Tapped, name: str) -> None:
    """SVD of hᵀ h± of keys that a plain hook reads where they leave the projection."""
    model, plain = worded(name)
    some = [
        Passage("the cat saw the dog .", "what saw the cat", "the old dog", "the dog"),
        Passage("the dog saw the old cat .", "the old cat", "saw", "old cat"),
        Passage("the old dog saw the cat .", "the dog", "the cat", "saw the cat"),
    ]
    read = plain.tokenizer = model.tokenizer
    kept: list[list[torch.Tensor]] = [[], [], []]  # (4 heads of two layers, tokens, d)
    for one in some:
        for kind, asked in enumerate((None, one.relevant, one.irrelevant)):
            start = read("Context:" if asked is None else f"Question: {asked}\nContext:")[
                "input_ids"
            ]
            body = read(" " + one.text, add_special_tokens=False)["input_ids"]
            answer = read(" " + one.answer, add_special_tokens=False)["input_ids"]
            (at,) = (i for i in range(len(body)) if body[i : i + len(answer)] == answer)
            keys = projected(plain, name, [*start, *body])
            rows = slice(len(start) + at, len(start) + at + len(answer))
            cut = [k[rows, 32:64] if name == "gpt2" else k[rows] for k in keys]
            each = [k.view(len(k), -1, 8).transpose(0, 1) for k in cut]
            kept[kind].append(torch.cat(each))
    alone, relevant, other = (torch.cat(k, 1) for k in kept)
    apart = (relevant - other).norm(dim=-1).mean(1) / alone.norm(dim=-1).mean(1)
    per = 4 if name == "gpt2" else 2
    edit = E.seka_for(model, SPAN, some, gain=0.25, negative=-0.5, share=0.8, k=2)
    order = sorted(sorted(range(len(apart)), key=lambda i: -float(apart[i]))[:2])
    assert [(h.layer, h.head) for h in edit.heads] == [divmod(i, per) for i in order]
    assert edit.gain == 0.25 and edit.keys == E.Span(*SPAN)
    middle = E.seka_for(model, SPAN, some, share=0.5, k=2, centred=True)
    for i, matrix in zip(order, middle.matrices, strict=True):
        a, b = (x[i] - x[i].mean(0) for x in (alone, relevant))
        values, vectors = torch.linalg.eigh(a.T @ b @ b.T @ a)
        size = values.clamp_min(0).sqrt().flip(0)
        rank = next(r for r in range(1, 9) if size[:r].sum() >= 0.5 * size.sum())
        u = vectors.flip(1)[:, :rank]
        torch.testing.assert_close(matrix.double(), u @ u.T, atol=2e-3, rtol=0)
    for i, matrix in zip(order, edit.matrices, strict=True):
        total = torch.zeros(8, 8, dtype=torch.float64)
        for after, sign in ((relevant[i], 1.0), (other[i], -0.5)):
            cross = alone[i].T @ after
            values, vectors = torch.linalg.eigh(cross @ cross.T)  # ascending: U, S²
            size = values.clamp_min(0).sqrt().flip(0)
            rank = next(r for r in range(1, 9) if size[:r].sum() >= 0.8 * size.sum())
            u = vectors.flip(1)
            u = u[:, :rank] if sign > 0 else u[:, rank:]
            total += sign * u @ u.T
        torch.testing.assert_close(matrix.double(), total, atol=2e-3, rtol=0)


def test_what_can_t_be_fitted(worded: Tapped) -> None:
    model, _ = worded("llama")
    one = Passage("the cat saw the dog .", "what", "who", "the dog")
    for wrong in (dict(examples=[one]), dict(share=0.0), dict(k=0), dict(k=99), dict(share="x")):
        with pytest.raises(InterpError):
            E.seka_for(model, SPAN, **{"examples": [one, one], **wrong})
    with pytest.raises(InputError, match="not in its passage"):
        E.seka_for(model, SPAN, [one, Passage("the cat", "what", "who", "the dog")])
    made = passages(12, 3)
    assert made == passages(12, 3) and len({p.text for p in made}) == 12
    assert all(p.answer in p.text and p.relevant != p.irrelevant for p in made)


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


def test_positions_that_are_no_rotation_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.build("llama")
    model, rotary = hook(plain), plain.model.rotary_emb
    own = rotary.forward

    def longer(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = own(x, position_ids)
        far = 1 + position_ids[..., None] / 10
        return cos * far, sin * far

    monkeypatch.setattr(rotary, "forward", longer)
    with pytest.raises(EditError, match="no rotation"), model.edit(edit()):
        pass


def test_angles_that_change_with_the_text_and_several_axes() -> None:
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    config = SimpleNamespace(max_position_embeddings=32, rope_parameters=rope)
    turns = Rotations({0: torch.eye(4).double()[None]}, config)
    assert turns.at(0, torch.tensor([3, 31])) is not None and not turns.several_axes
    with pytest.raises(TapError, match="begin to change"):
        turns.at(0, torch.tensor([3, 32]))
    inner = SimpleNamespace(rope_parameters=dict(mrope_section=[2, 1, 1]))
    assert Rotations({}, SimpleNamespace(text_config=inner)).several_axes
