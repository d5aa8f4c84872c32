"""Vision-language models of every family with a real picture through their own processor: the tap
changes nothing, towers and image tokens are found, masses are the eager ones, heads are edited."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from interp import vision
from interp.edits import ScaleHeads, ScaleTokens
from interp.errors import EditError, InputError
from interp.vision.divergence import vhd
from interp_hooks import HookedModel, hook
from interp_hooks.conformance import vlm
from interp_hooks.huggingface.images import image_mask

#: they read images by other ways than tokens in the prompt, or no text without
OTHERWISE = {"mllama", "blip-2", "kosmos-2"}
WITHOUT_TOWER = {"chameleon"}  # its pictures become words before any attention


class Family:
    def __init__(self, name: str) -> None:
        self.name = name
        module, self.inputs, self.padded, processor = vlm.build(name)
        self.eager = copy.deepcopy(module)
        self.eager.set_attn_implementation("eager")
        given: dict[str, Any] = dict(processor=processor)
        self.model: HookedModel = hook(
            module, name=name, **(given if processor is not None else dict(sample=self.inputs))
        )


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


#: in every run; the others nightly
FAST = {"llava", "idefics3", "qwen2_vl", "mistral3", "mllama", "chameleon"}


def tiers(names: Any) -> list[Any]:
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in names]


every = pytest.mark.parametrize("family", tiers(vlm.FAMILIES), indirect=True)
with_tokens = pytest.mark.parametrize(
    "family", tiers(n for n in vlm.FAMILIES if n not in OTHERWISE), indirect=True
)


def text_weights(family: Family, given: dict[str, Any]) -> dict[int, torch.Tensor]:
    """layer → A (batch, heads, queries, keys) of the untapped twin's text tower."""
    found: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            found[layer] = out[1].double()

        return hook

    handles = [
        family.eager.get_submodule(s.path).register_forward_hook(note(s.layer))
        for s in family.model.sites
        if s.is_main and s.kind == "self"
    ]
    try:
        with torch.no_grad():
            family.eager(**given, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


@every
def test_the_tap_changes_nothing(family: Family) -> None:
    for given in filter(None, (family.inputs, family.padded)):
        with torch.no_grad():
            wanted = family.eager(**given).logits
            with family.model.observe("entropy"):
                found = family.model(**given).logits
        real = given.get("attention_mask", torch.ones(found.shape[:2])).bool()
        torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
    towers = set(family.model.towers)
    assert towers >= ({""} if family.name in WITHOUT_TOWER else {"vision", "text"})


@with_tokens
def test_masses_are_the_eager_ones(family: Family) -> None:
    """Also in a left-padded batch; spans hold the tokens that the model puts pixels in."""
    for given in filter(None, (family.inputs, family.padded)):
        mask = image_mask(family.model.module.config, given["input_ids"], given)
        assert mask is not None and bool(mask.any(1).all())
        slots = [
            [k for a, b in row for k in range(a, b)] for row in vision.spans(family.model, given)
        ]
        assert slots == [row.nonzero().flatten().tolist() for row in mask]
        real = given.get("attention_mask", torch.ones_like(mask)).bool()
        wanted = text_weights(family, given)
        with torch.no_grad(), family.model.observe("group_mass", labels=mask.long()) as seen:
            family.model(**given)
        for layer, a in wanted.items():
            mass = (a * mask[:, None, None]).sum(-1).transpose(1, 2)[real]
            found = seen[layer].group_mass[..., 1].double().transpose(1, 2)[real]
            torch.testing.assert_close(found, mass, atol=1e-4, rtol=1e-4)


@with_tokens
def test_image_tokens_are_those_that_a_picture_changes(family: Family) -> None:
    """Another picture changes the embeddings that enter the text tower at these tokens and no
    others."""
    given = dict(family.inputs)
    entered: list[torch.Tensor] = []
    first = min((s for s in family.model.sites if s.is_main), key=lambda s: s.layer)
    block = family.model.module.get_submodule(first.path.rpartition(".")[0])

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            family.model.module(**given)
            generator = torch.Generator().manual_seed(5)
            noise = torch.randn(given["pixel_values"].shape, generator=generator)
            given["pixel_values"] = given["pixel_values"] * 0.1 + 3 * noise
            family.model.module(**given)
    finally:
        handle.remove()
    changed = ((entered[0] - entered[1]).abs().amax(-1) > 1e-6)[0]
    mask = image_mask(family.model.module.config, given["input_ids"], given)[0]  # type: ignore[index]
    assert not bool((changed & ~mask).any())
    kept = int((mask & ~changed).sum())
    if family.name in ("llava_next", "llava_onevision"):  # tokens at the ends of rows are the same
        assert kept == 4  # rows
    elif family.name != "chameleon":  # its tokens are codes, which need not become others
        assert kept == 0


@every
def test_heads_of_the_text_are_edited_and_generation_runs(family: Family) -> None:
    model, given = family.model, family.inputs
    site = next(s for s in model.sites if s.is_main and s.kind == "self")
    with torch.no_grad():
        plain = model(**given).logits
        with model.edit(ScaleHeads({f"L{site.layer}H1": 0.0})):
            assert not torch.equal(model(**given).logits, plain)
        assert torch.equal(model(**given).logits, plain)
        more = dict(max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**given, **more), family.eager.generate(**given, **more))


@with_tokens
def test_image_keys_are_the_image_tokens(family: Family) -> None:
    model, given = family.model, family.padded or family.inputs
    mask = image_mask(model.module.config, given["input_ids"], given)
    with torch.no_grad():
        said = []
        for keys in ("image", mask):
            with model.edit(ScaleTokens(keys, 0.2)):
                said.append(model.generate(**given, max_new_tokens=4, do_sample=False))
    assert torch.equal(*said)


@with_tokens
def test_divergence_is_the_eager_one(family: Family) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    sites = [s for s in family.model.sites if s.is_main and s.kind == "self"]

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            z = args[0].reshape(1, -1, args[0].shape[-1])
            seen.setdefault(layer, []).append(z[:, -1])

        return hook

    handles = [
        family.eager.get_submodule(s.path).o_proj.register_forward_pre_hook(note(s.layer))
        for s in sites
    ]
    with torch.no_grad():
        family.eager(**family.inputs)
        family.eager(**vision.without_images(family.model, family.inputs))
    for handle in handles:
        handle.remove()
    found = vhd(family.model, family.inputs)
    for site in sites:
        a, b = seen[site.layer]
        wanted = (a - b).double().view(1, site.n_heads, -1).norm(dim=-1)
        torch.testing.assert_close(found[site.layer].double(), wanted, atol=1e-4, rtol=1e-4)


def test_what_reads_images_otherwise_is_refused_where_tokens_are_asked_for() -> None:
    mllama = Family("mllama")
    assert {s.layer for s in mllama.model.sites if s.kind == "cross"} == {1, 3}
    assert {s.layer for s in mllama.model.sites if s.is_main and s.kind == "self"} == {0, 2}
    for ask in (
        lambda: vision.spans(mllama.model, mllama.inputs),
        lambda: vhd(mllama.model, mllama.inputs),
        lambda: vision.overlay(mllama.model, vlm.picture(), vlm.PROMPT, "L0H0"),
    ):
        with pytest.raises(InputError, match="cross-attention"):
            ask()
    with (
        torch.no_grad(),
        mllama.model.edit(ScaleTokens("image", 2.0)),
        pytest.raises(EditError, match="has none"),
    ):
        mllama.model(**mllama.inputs)
    for name in ("blip-2", "kosmos-2"):
        other = Family(name)
        with pytest.raises(InputError, match="no text alone"):
            vhd(other.model, other.inputs)
        assert len(vision.spans(other.model, other.inputs)[0]) == 1
