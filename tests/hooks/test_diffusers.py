"""diffusers' models: attention by its definition, in the place of torch's own function."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import pytest
import tiny_diffusers
import torch
from diffusers.models import attention_processor
from sdpa import eager

from interp import edits as E
from interp.errors import EditError, HeadError, TapError
from interp_hooks import HookedModel, hook
from interp_hooks.diffusion.samples import sample_of

NAMES = list(tiny_diffusers.MODELS)
#: tower, layer and kind of each attention, in order of calls
SITES = {
    "dit": [("", 0, "self"), ("", 1, "self")],
    "pixart": [("", 0, "self"), ("", 0, "cross"), ("", 1, "self"), ("", 1, "cross")],
    "sd3": [("", 0, "self"), ("", 1, "self")],
    "sd3.5": [("", 0, "self"), ("attn2", 0, "self"), ("", 1, "self")],
    "flux": [("", 0, "self"), ("", 1, "self")],
    "unet": [("", n, kind) for n in range(4) for kind in ("self", "cross")],
}


def model_of(name: str) -> tuple[HookedModel, dict[str, Any]]:
    module = tiny_diffusers.build(name)
    return hook(module, name=name), sample_of(module)


def out_of(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given, return_dict=False)[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_statistics_are_those_of_the_definition(name: str) -> None:
    model, given = model_of(name)
    with eager() as weights:
        plain = out_of(model.module, given)
    with model.observe("entropy", "max", "argmax") as seen, model.capture_z() as z:
        found = out_of(model.module, given)  # a pipeline calls the module itself
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
    assert len(weights) == len(SITES[name]) == len(model.sites)
    for (tower, layer, kind), a in zip(SITES[name], weights, strict=True):
        key = layer if (tower, kind) == ("", "self") else (tower or kind, layer)
        stats = seen[key]
        for statistic, value in {
            "entropy": torch.special.entr(a).sum(-1),
            "max": a.amax(-1),
            "argmax": a.argmax(-1),
        }.items():
            torch.testing.assert_close(
                stats[statistic], value.to(stats[statistic]), atol=1e-4, rtol=1e-3
            )
        assert z[key].shape[1:3] == (a.shape[2], a.shape[1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_head_is_edited_and_no_other(name: str) -> None:
    model, given = model_of(name)
    number = len(SITES[name]) - 1  # the last attention
    tower, layer, kind = SITES[name][number]
    head = f"{'cross.' if kind == 'cross' else tower and tower + '.'}L{layer}H1"

    def change(n: int, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        z = a @ v
        if n == number:
            z[:, 1] *= -0.5
        return z

    with eager(change):
        wanted = out_of(model.module, given)
    with model.edit(E.ScaleHeads({head: -0.5})):
        found = out_of(model, given)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    plain = out_of(model, given)
    assert (plain - wanted).abs().max() > 1e-4
    with eager():
        torch.testing.assert_close(plain, out_of(model.module, given), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dit", "flux"])
@torch.no_grad()
def test_attention_is_blended_with_the_identity(name: str) -> None:
    """SoftPAG, of the heads of one layer."""
    model, given = model_of(name)

    def change(n: int, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (0.3 * a + 0.7 * torch.eye(a.shape[-1]) if n == 1 else a) @ v

    with eager(change):
        wanted = out_of(model.module, given)
    with model.edit(E.SoftPAG(0.7, [f"L1H{h}" for h in range(model.n_heads)])):
        torch.testing.assert_close(out_of(model, given), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pixart", "unet"])
@torch.no_grad()
def test_tokens_of_the_text_are_turned_up_in_cross_attention(name: str) -> None:
    model, given = model_of(name)
    heads = [f"cross.L{s.layer}H{h}" for s in model.sites if s.kind == "cross" for h in range(4)]

    def change(n: int, a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if SITES[name][n][2] == "cross":
            a = a.clone()
            a[..., 2:4] *= 5
            a /= a.sum(-1, keepdim=True)
        return a @ v

    with eager(change):
        wanted = out_of(model.module, given)
    with model.edit(E.ScaleTokens((2, 4), 5.0, heads=heads)):
        torch.testing.assert_close(out_of(model, given), wanted, atol=2e-5, rtol=1e-4)
    words = E.ScaleTokens(E.Span("a cat"), 5.0, heads=heads)
    with pytest.raises(EditError, match="no tokenizer"), model.edit(words):
        pass


@torch.no_grad()
def test_padding_of_the_text_hides_its_keys() -> None:
    model, given = model_of("pixart")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    with model.observe("received") as seen:
        out_of(model, {**given, "encoder_attention_mask": mask})
    received = seen["cross", 0].received[0]
    assert received[:, 4:].abs().max() < 1e-6 < received[:, :4].min()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_head_weights_are_proved_or_refused(name: str) -> None:
    model, given = model_of(name)
    for site in model.sites:
        module = model.module.get_submodule(site.path)
        key = site.layer if site.is_main else (site.tower or site.kind, site.layer)
        if name in ("sd3", "sd3.5", "flux") and site.tower == "":
            with pytest.raises(TapError, match="head"):
                model._adapter.head_weights(site)
            continue
        weights = model._adapter.head_weights(site)
        outs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda m, a, out, outs=outs: outs.append(out))
        with model.capture_z() as z:
            out_of(model, given)
        handle.remove()
        found = torch.einsum("bqhd,hdm->bqm", z[key], weights.W_O) + weights.b_O
        torch.testing.assert_close(found, outs[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_blocks_leave_nothing_behind_and_explain_says_what_they_do() -> None:
    model, given = model_of("dit")
    before = [set(vars(m)) for m in model.module.modules()]
    with model.edit(E.SoftPAG(1.0, ["L1H0"])), model.capture_z():
        said = model.explain()
        out_of(model, given)
    assert [set(vars(m)) for m in model.module.modules()] == before
    assert "soft_pag" in said and "layer 1" in said
    assert repr(model) == "HookedModel(dit: 2 layers × 4 heads, 4 kv heads)"
    with pytest.raises(HeadError), model.edit(E.Ablate(["L2H0"])):
        pass


def test_another_thread_is_refused() -> None:
    model, given = model_of("dit")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            model(**given)
        except TapError as error:
            failed.append(error)

    with model.capture_z():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(failed) == 1 and "one thread at a time" in str(failed[0])


def test_gradients_flow_through_edits() -> None:
    model, given = model_of("dit")
    gain = torch.tensor(0.5, requires_grad=True)
    with model.edit(E.ScaleHeads({"L1H2": gain})):
        out_of(model, given).square().sum().backward()
    with torch.no_grad():
        sums = []
        for g in (0.499, 0.501):
            with model.edit(E.ScaleHeads({"L1H2": g})):
                sums.append(float(out_of(model, given).double().square().sum()))
    assert gain.grad is not None
    assert float(gain.grad) == pytest.approx((sums[1] - sums[0]) / 0.002, rel=2e-2)


def test_what_can_not_be_seen_is_refused_in_a_sentence() -> None:
    module = tiny_diffusers.build("dit")
    for part in module.modules():
        if hasattr(part, "set_processor"):
            part.set_processor(attention_processor.AttnProcessor())
    with pytest.raises(TapError, match="native"):
        hook(module)
    sana = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    )
    with pytest.raises(TapError, match="linear attention"):
        hook(sana.eval())
    with pytest.raises(TapError, match="give the arguments of a forward"):
        hook(
            diffusers.HunyuanDiT2DModel(
                num_attention_heads=4,
                attention_head_dim=8,
                in_channels=4,
                patch_size=2,
                sample_size=8,
                hidden_size=32,
                num_layers=2,
                cross_attention_dim=16,
                cross_attention_dim_t5=16,
                pooled_projection_dim=16,
                text_len=7,
                text_len_t5=7,
            ).eval()
        )
    model = hook(tiny_diffusers.build("dit"))
    for call in (
        lambda: model.generate(),
        lambda: model.vocabulary(),
        lambda: model.capture_resid().__enter__(),
    ):
        with pytest.raises(TapError):
            call()
