"""Selective temperatures against their formula in float64, with padding and in steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from interp.errors import InputError
from interp.nn import SelectiveTemperature, selective
from interp_hooks import Question, hook


def by_hand(layer: SelectiveTemperature, x: torch.Tensor, places: list[int]) -> torch.Tensor:
    """(tokens, out) of x (tokens, in), a token and a head at a time."""
    weight, bias = layer.weight.double(), layer.bias
    rows = []
    for token, place in zip(x.double(), places, strict=True):
        y = weight @ token + (0 if bias is None else bias.double())
        pos = 1.0
        if layer.beta is not None:
            pos += math.exp(-math.exp(float(layer.beta.detach()))) * math.log(place + 1)
        heads = 1 if layer.w is None else len(layer.w)
        parts = []
        for h, part in enumerate(y.chunk(heads)):
            tok = 0.0
            if layer.w is not None:
                gelu = 0.5 * part * (1 + torch.erf(part / math.sqrt(2)))
                tok = math.tanh(float(layer.w[h].detach().double() @ gelu.detach()))
            parts.append((tok + pos) * part)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def stirred(layer: SelectiveTemperature) -> SelectiveTemperature:
    with torch.no_grad():
        if layer.w is not None:
            layer.w.normal_(generator=torch.Generator().manual_seed(1))
        if layer.beta is not None:
            layer.beta.fill_(-0.5)
    return layer


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("position", [True, False])
def test_against_the_formula(token: bool, position: bool) -> None:
    torch.manual_seed(0)
    layer = stirred(SelectiveTemperature(nn.Linear(6, 12), 4, token, position))
    x = torch.randn(2, 5, 6)
    for row in range(2):
        wanted = by_hand(layer, x[row], [0, 1, 2, 3, 4])
        torch.testing.assert_close(layer(x)[row].double(), wanted, atol=1e-5, rtol=1e-5)
    layer.positions = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 0, 1, 2]])
    for row, places in enumerate(layer.positions.tolist()):
        wanted = by_hand(layer, x[row], places)
        torch.testing.assert_close(layer(x)[row].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture
def changed() -> Any:
    module = tiny.build("llama")
    assert len(selective(module, position=True)) == 4
    for part in module.modules():
        if isinstance(part, SelectiveTemperature):
            stirred(part)
    return module


def test_a_model_begins_as_itself_and_learns_the_factors() -> None:
    module, plain = tiny.build("llama"), tiny.build("llama")
    ids = torch.arange(3, 15)[None]
    names = selective(module, position=False)
    assert names[0] == "model.layers.0.self_attn.q_proj" and len(names) == 4
    torch.testing.assert_close(module(ids).logits, plain(ids).logits)
    module(ids).logits.square().mean().backward()
    made = [p for p in module.modules() if isinstance(p, SelectiveTemperature)]
    assert all(float(p.w.grad.abs().max()) > 0 for p in made if p.w is not None)
    new = sum(p.w.numel() for p in made if p.w is not None)
    assert new == sum(p.out_features for p in made)


@torch.no_grad()
def test_padding_and_steps_count_from_the_first_real_token(changed: Any) -> None:
    ids = torch.randint(3, 101, (1, 9), generator=torch.Generator().manual_seed(0))
    wanted = changed(input_ids=ids).logits
    out = changed(input_ids=ids[:, :6], use_cache=True)
    for step in range(6, 9):
        part = ids[:, step : step + 1]
        out = changed(input_ids=part, past_key_values=out.past_key_values, use_cache=True)
        torch.testing.assert_close(out.logits[0, -1], wanted[0, step], atol=1e-5, rtol=1e-5)
    padded = torch.nn.functional.pad(ids, (3, 0), value=1)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    found = changed(
        input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
    ).logits[:, 3:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    changed.model.layers[1].self_attn.q_proj.beta.fill_(2.0)
    assert float((changed(input_ids=ids).logits - wanted).abs().max()) > 1e-4


@torch.no_grad()
def test_the_query_is_the_temperature_of_its_logits() -> None:
    """Rotation leaves a factor alone: what the attention call gets is its own times the factors."""
    factor = 1 + math.exp(-math.exp(-0.5)) * torch.arange(1, 13).log()
    calls: list[Any] = []
    for settings in (None, dict(token=False, beta=-0.5)):
        module = tiny.build("llama")
        if settings:
            selective(module, **settings)  # type: ignore[arg-type]
        model = hook(module)
        with model.watch(Question(call=True), lambda stats: calls.append(stats.call)):
            model.logits(torch.arange(3, 15)[None])
    own, scaled = calls[0], calls[2]  # two layers each
    for name in ("query", "value"):
        found, plain = getattr(scaled, name), getattr(own, name)
        torch.testing.assert_close(found, plain * factor[:, None], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scaled.key, own.key)


def test_refusals() -> None:
    with pytest.raises(InputError, match="whole number of heads"):
        SelectiveTemperature(nn.Linear(4, 6), 4)
    with pytest.raises(InputError, match="Linear"):
        SelectiveTemperature(nn.ReLU(), 4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="finite"):
        SelectiveTemperature(nn.Linear(4, 4), 4, beta=math.nan)
    with pytest.raises(InputError, match="No attention"):
        selective(nn.Linear(4, 4))
    layer = SelectiveTemperature(nn.Linear(4, 4), 4)
    layer.positions = torch.arange(3)[None]
    with pytest.raises(InputError, match="3 positions"):
        layer(torch.zeros(1, 2, 4))
