"""One damaged patch, and clusters of heads: an untouched eager ViT, and planted patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import interp
from interp.edits import Temperature
from interp.errors import InputError
from interp.vision import patch_damage
from interp.vision.cluster_checks import KINDS, agreements, rand_index

TAU = 3.0


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4, num_labels=5, initializer_range=0.4,
    )  # fmt: skip
    return hf.ViTForImageClassification(config).eval()


def eager(vit: Any, pictures: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logits, and (layers · heads, n, queries, keys), of the eager model whose queries are divided
    by τ."""
    import copy

    twin = copy.deepcopy(vit)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "query" in name or "q_proj" in name:
                parameter.div_(tau)
    out = twin(pixel_values=pictures, output_attentions=True)
    return out.logits, torch.cat([a.transpose(0, 1) for a in out.attentions])


def patch(place: int) -> tuple[slice, slice, slice]:
    row, column = divmod(place, 4)
    return slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)


def test_damage_is_its_definition(vit: Any) -> None:
    n, steps = 6, 3
    pictures = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = patch_damage(
        interp.load(vit), pictures, torch.arange(n) % 5, [None, Temperature(TAU)],
        level=2.0, steps=steps, seed=4,
    )  # fmt: skip
    rng = np.random.default_rng(4)
    places = [rng.permutation(16)[:2].tolist() for _ in range(n)]
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(4))
    low, high = pictures.min(), pictures.max()

    def attacked(tau: float) -> torch.Tensor:
        shown, target = pictures.clone(), eager(vit, pictures, tau)[0].argmax(-1)
        for _ in range(steps):
            asked = shown.clone().requires_grad_()
            logits, _ = eager(vit, asked, tau)
            torch.nn.functional.cross_entropy(logits, target).backward()
            assert asked.grad is not None
            step = (shown + (high - low) / 10 * asked.grad.sign()).clamp(low, high)
            for i, (place, _) in enumerate(places):
                shown[i][patch(place)] = step[i][patch(place)]
        return shown

    kinds = {
        "noise": lambda tau: pictures + 2.0 * pictures.std() * noise,
        "adversarial": attacked,
        "transferred": lambda tau: attacked(1.0),
    }
    assert len(found.frame) == 6 and len(found.heads) == 24
    for row in found.frame.itertuples():
        tau = (1.0, TAU)[row.edit]
        shown = kinds[row.kind](tau)
        damaged, moved = pictures.clone(), pictures.clone()
        for i, (place, other) in enumerate(places):
            damaged[i][patch(place)] = shown[i][patch(place)]
            moved[i][patch(other)] = shown[i][patch(place)]
        clean, before = eager(vit, pictures, tau)
        said, after = eager(vit, damaged, tau)
        own = clean.argmax(-1)
        assert row.changed == pytest.approx(float((said.argmax(-1) != own).float().mean()))
        elsewhere = eager(vit, moved, tau)[0].argmax(-1)
        assert row.elsewhere == pytest.approx(float((elsewhere != own).float().mean()))
        right = (said.argmax(-1) == torch.arange(n) % 5).float().mean()
        assert row.accuracy == pytest.approx(float(right)) and row.low <= row.changed <= row.high
        wanted = {
            "before": [before[:, i, :, 1 + p].mean(-1) for i, (p, _) in enumerate(places)],
            "after": [after[:, i, :, 1 + p].mean(-1) for i, (p, _) in enumerate(places)],
            "other": [after[:, i, :, 1 + q].mean(-1) for i, (_, q) in enumerate(places)],
        }
        mine = found.heads.query("kind == @row.kind and edit == @row.edit")
        assert list(mine["head"]) == ["L0H0", "L0H1", "L1H0", "L1H1"]
        for name, values in wanted.items():
            each = torch.stack(values).mean(0).detach().numpy()  # (heads,)
            np.testing.assert_allclose(mine[name], each, atol=2e-5)
            assert getattr(row, name) == pytest.approx(float(each.mean()), abs=2e-5)


def test_what_can_t_be_damaged(vit: Any) -> None:
    model, some = interp.load(vit), torch.randn(2, 3, 16, 16)
    for wrong in (dict(kinds=["hole"]), dict(level=-1), dict(steps=-1), dict(seed=-1)):
        with pytest.raises(InputError):
            patch_damage(model, some, **wrong)
    with pytest.raises(InputError, match="n, channels"):
        patch_damage(model, some[0])
    with pytest.raises(InputError, match="pictures alone"):
        patch_damage(interp.load("llama"), some)
    with pytest.raises(InputError, match="no classes"):
        patch_damage(interp.load(vit.vit), some)


def planted(noise: float, seed: int) -> torch.Tensor:
    """(12, 16, 16) patterns of three kinds: at themselves, at one cell, at the cell before."""
    rng = torch.Generator().manual_seed(seed)
    kinds = [torch.eye(16), torch.eye(16)[3].repeat(16, 1), torch.eye(16).roll(-1, 0)]
    shares = torch.stack([kinds[i % 3] for i in range(12)])
    made = shares + noise * torch.rand(shares.shape, generator=rng)
    return made / made.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_kinds_are_found_and_shuffled_ones_are_not(kind: str) -> None:
    layers = np.arange(12) % 3  # as if each layer had its kind
    one, other = planted(0.02, 0), planted(0.02, 1)
    found = agreements(one, other, KINDS[kind], 3, 0, 6, layers)
    assert found["halves"] == found["seeds"] == found["layers"] == 1.0
    assert found["shuffled"] < 0.5 and found["shuffled"] <= found["shuffled_high"] <= 1
    mixed = agreements(one, other, KINDS[kind], 3, 0, 2, np.arange(12) // 4)
    assert mixed["layers"] < 0.1


def test_the_rand_index_is_scikit_learn_s() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(20):
        n, k = int(rng.integers(2, 20)), int(rng.integers(1, 5))
        one, other = rng.integers(0, k, n), rng.integers(0, 4, n)
        assert rand_index(one, other) == pytest.approx(metrics.adjusted_rand_score(one, other))


def test_stability_refuses(vit: Any) -> None:
    model, some = interp.load(vit), [dict(pixel_values=torch.randn(1, 3, 16, 16))] * 2
    for wrong in (dict(prompts=some[:1]), dict(draws=0), dict(clusters=5), dict(clusters=0)):
        with pytest.raises(InputError):
            interp.vision.cluster_stability(model, **{"prompts": some, **wrong})
    found = interp.vision.cluster_stability(model, some, clusters=2, draws=1)
    assert list(found["halves"]) == [1.0, 1.0]  # the same picture twice
