"""Vision-language models of every family: the tap changes nothing, towers and image tokens are
found, heads edited."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_vision
import torch
from tiny_vision import IMAGE, build, pixels

import interp
from interp import vision
from interp.edits import ScaleHeads, ScaleTokens
from interp.errors import EditError, HeadError, InputError, TapError
from interp.vision.divergence import vhd
from interp_hooks import Head, HookedModel, hook
from interp_hooks.huggingface.images import image_spans


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest,
) -> tuple[HookedModel, dict[str, torch.Tensor], torch.Tensor, Any]:
    """A hooked model, its input, the untouched model's logits, and an eager copy."""
    module, given = build(request.param)
    eager = tiny.eager(module)
    with torch.no_grad():
        wanted = module(**given).logits
    return hook(module, sample=given, name=request.param), given, wanted, eager


every_family = pytest.mark.parametrize("made", list(tiny_vision.FAMILIES), indirect=True)


@every_family
def test_towers_and_logits(made: Any) -> None:
    model, given, wanted, eager = made
    assert model.towers == ["vision", "text"] and (model.n_layers, model.n_heads) == (2, 4)
    assert [s.layer for s in model.sites if s.tower == "vision"] == [0, 1]
    assert str(model.heads[0]) == "vision.L0H0" and str(model.heads[-1]) == "text.L1H3"
    with torch.no_grad(), model.observe("entropy", "received") as seen:
        found = model(**given).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        out = eager(**given, output_attentions=True)
    torch.testing.assert_close(found, out.logits, atol=1e-4, rtol=1e-4)
    for layer in range(2):  # image blocks that see each other keep their masks
        a = out.attentions[layer].double()
        torch.testing.assert_close(
            seen[layer].entropy.double(), torch.special.entr(a).sum(-1), atol=1e-4, rtol=1e-4
        )
        assert torch.equal(seen["text", layer].entropy, seen[layer].entropy)
        assert seen["vision", layer].entropy.shape[1] == 4


@every_family
def test_image_tokens(made: Any) -> None:
    model, given, _, _ = made
    row = given["input_ids"]
    (spans,) = image_spans(model.module.config, row)
    assert [i for a, b in spans for i in range(a, b)] == (
        row[0] == IMAGE
    ).nonzero().flatten().tolist()
    assert len(spans) == 1
    with torch.no_grad(), model.edit(ScaleTokens("image", 3.0)):
        named = model(**given).logits
    with torch.no_grad(), model.edit(ScaleTokens(row == IMAGE, 3.0)):
        listed = model(**given).logits
    torch.testing.assert_close(named, listed, atol=1e-6, rtol=1e-6)


@every_family
def test_heads_of_both_towers_are_edited(made: Any) -> None:
    model, given, wanted, _ = made
    for head in ("vision.L0H1", "text.L1H2", "L1H2"):
        with torch.no_grad(), model.edit(ScaleHeads({head: 0.0})):
            changed = model(**given).logits
        assert float((changed - wanted).abs().max()) > 1e-6, head
    with torch.no_grad():
        assert torch.equal(model(**given).logits, wanted)
    for head in (Head(2, 0, "vision"), Head(0, 4, "text"), Head(0, 0, "audio")):
        with pytest.raises(HeadError):
            model.check(head)


@every_family
def test_the_image_can_be_taken_out(made: Any) -> None:
    """What is left is the text alone, and the model reads it as it would have."""
    model, given, _, _ = made
    left = vision.without_images(model, given)
    assert left["input_ids"][0].tolist() == [
        t for t in given["input_ids"][0].tolist() if t != IMAGE
    ]
    with torch.no_grad():
        assert bool(torch.isfinite(model(**left).logits).all())


@every_family
def test_divergence_is_the_eager_one(made: Any) -> None:
    """‖a(with image) − a(image removed)‖₂, a read from what W_O is given in a copy that was never
    tapped."""
    model, given, _, eager = made
    inputs_of: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    found = vhd(model, given)
    layers = [eager.get_submodule(site.path) for site in model.sites if site.tower == "text"]
    handles = [
        module.o_proj.register_forward_pre_hook(
            lambda m, args, i=i: inputs_of[i].append(args[0][:, -1].detach())
        )
        for i, module in enumerate(layers)
    ]
    with torch.no_grad():
        eager(**given)
        eager(**vision.without_images(model, given))
    for handle in handles:
        handle.remove()
    for layer, (with_image, without) in inputs_of.items():
        wanted = (with_image - without).double().view(1, 4, -1).norm(dim=-1)
        torch.testing.assert_close(found[layer].double(), wanted, atol=1e-4, rtol=1e-4)
        assert float(wanted.min()) > 1e-4


def test_generation_remembers_the_image() -> None:
    """In decode steps the image's tokens are still known, in a batch with beams and left padding
    too."""
    module, given = build("llava")
    model = hook(module, sample=given)
    row = given["input_ids"]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), row[:, :-2]], 1)
    both = dict(input_ids=torch.cat([row, padded]), pixel_values=pixels(2, 3, 16, 16))
    both["attention_mask"] = (both["input_ids"] != 0).long()
    mask = both["input_ids"] == IMAGE
    for how in (dict(num_beams=1), dict(num_beams=3)):
        said = []
        for keys in ("image", mask):
            with torch.no_grad(), model.edit(ScaleTokens(keys, 0.2)):
                said.append(model.generate(**both, max_new_tokens=5, do_sample=False, **how))
        assert torch.equal(*said)


def test_several_images_in_a_prompt() -> None:
    """Images that touch are told apart where all have the same size; text between them tells them
    apart anyway."""
    module, given = build("llava")
    model = hook(module, sample=given)
    touching = torch.tensor([[1, *[IMAGE] * 32, 5, 6], [0, 0, 1, *[IMAGE] * 16, 7, *[IMAGE] * 15]])
    first, second = image_spans(model.module.config, touching)
    assert first == [(1, 17), (17, 33)] and second == [(3, 19), (20, 35)]
    apart = torch.tensor([[1, *[IMAGE] * 16, 8, *[IMAGE] * 16, 5]])
    with (
        torch.no_grad(),
        model.observe("group_mass", labels=torch.where(apart == IMAGE, 0, -1)) as seen,
    ):
        model(input_ids=apart, pixel_values=pixels(2, 3, 16, 16))
    assert float(seen[0].group_mass[0, :, -1, 0].min()) > 0
    assert image_spans(model.module.config, apart) == [[(1, 17), (18, 34)]]


def test_without_a_processor_or_a_sample() -> None:
    module, given = build("llava")
    assert hook(module).towers == ["vision", "text"]  # a picture is made from its config
    module.config.image_token_index = module.config.image_token_id = 10**6  # no such token
    with pytest.raises(TapError, match="processor"):
        hook(module)
    module.config.image_token_index = module.config.image_token_id = IMAGE
    model = hook(module, sample=given)
    with pytest.raises(InputError, match="processor"):
        vision.with_images(model, "what", ["x.png"])
    with (
        torch.no_grad(),
        model.edit(ScaleTokens("image", 2.0)),
        pytest.raises(EditError, match="has none"),
    ):
        model(input_ids=torch.tensor([[1, 3, 4, 5]]))
    with pytest.raises(InputError, match="none can be taken out"):
        vision.without_images(model, dict(input_ids=torch.tensor([[1, 3, 4]])))


def test_a_text_only_model_is_told_from_one_with_images() -> None:
    model = interp.load("llama")
    assert not vision.takes_images(model)
    with pytest.raises(InputError, match="takes no images"):
        vision.with_images(model, "what", ["x.png"])
    with (
        torch.no_grad(),
        model.edit(ScaleTokens("image", 2.0)),
        pytest.raises(EditError, match="has none"),
    ):
        model(input_ids=torch.tensor([[1, 3, 4, 5]]))
