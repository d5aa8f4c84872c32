"""VHR, VAR and PAINT of prompts with images, against definitions written out with an untouched
eager model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_vision
import torch
import transformers as hf
from seeing import HOW, alone, attending, generated, llava, prompts, stepwise, weights

from interp import edits as E
from interp.edits.fit_paint import paint_for, spatial_patches
from interp.edits.fit_vhr import select_heads, vhr_for, vhr_layers
from interp.errors import EditError, HeadError, InputError
from interp.vision.class_token import cls_attention
from interp.vision.prompts import without_images
from interp.vision.sinks import published_dims
from interp_hooks import hook
from interp_hooks.edit import Edit

IMAGE = 4  # the token


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def last_outputs(twin: Any, inputs: Any, gains: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """(heads, d) of each layer: what goes into W_O at the last position, with earlier layers' heads
    × gains there."""
    store: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for layer, block in enumerate(twin.model.language_model.layers):

            def scaled(module: Any, args: Any, layer: int = layer) -> Any:
                z = args[0].clone()
                store[layer] = z[0, -1].reshape(8, -1).clone()
                if layer in gains:
                    z[0, -1] = (store[layer] * gains[layer][:, None]).flatten()
                return (z,)

            stack.callback(block.self_attn.o_proj.register_forward_pre_hook(scaled).remove)
        twin(**inputs)
    return [store[layer] for layer in range(len(store))]


def chosen_by_hand(vhd: list[float], activation: list[float], guard: bool) -> list[bool]:
    def high(x: list[float], value: float) -> bool:
        return value > float(np.mean(x)) + float(np.std(x))

    kept = [
        0.0 if guard and high(vhd, d) and high(activation, t) else d
        for d, t in zip(vhd, activation, strict=True)
    ]
    return [d > median(kept) for d in kept]


@pytest.mark.parametrize(
    "settings", [dict(), dict(guard=False), dict(layers=[3, 0], alpha=3.0)], ids=str
)
def test_vhr_selects_layer_by_layer_what_its_definition_does(settings: dict[str, Any]) -> None:
    model, twin = llava()
    inputs = prompts()
    found = select_heads(model, inputs, **settings)
    alpha, guard = settings.get("alpha", 2.0), settings.get("guard", True)
    for row in range(2):
        seen = alone(inputs, row)
        words = seen["input_ids"][seen["input_ids"] != IMAGE][None]
        gains: dict[int, torch.Tensor] = {}
        for layer in sorted(settings.get("layers", [1, 2, 3])):
            image, text = (
                last_outputs(twin, given, gains)[layer].double()
                for given in (seen, dict(input_ids=words))
            )
            vhd, activation = (image - text).norm(dim=-1), text.pow(2).sum(-1)
            chosen = torch.tensor(chosen_by_hand(vhd.tolist(), activation.tolist(), guard))
            gains[layer] = torch.where(chosen, alpha, 1.0)
            torch.testing.assert_close(
                found.divergence[row, layer].double(), vhd, atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                found.text_activation[row, layer].double(), activation, atol=1e-4, rtol=1e-4
            )
            assert torch.equal(found.selected[row, layer], chosen)
        others = [layer for layer in range(4) if layer not in gains]
        assert not bool(found.selected[row, others].any()) and not bool(
            found.divergence[row, others].any()
        )


def test_vhr_guards_against_heads_that_text_drives() -> None:
    vhd, text = [9.0, 1, 2, 3, 4, 5, 6, 7], [50.0, 1, 1, 1, 1, 1, 1, 1]
    for guard in (True, False):
        found = E.VHR.select(torch.tensor([vhd]), torch.tensor([text]), guard=guard)
        wanted = chosen_by_hand(vhd, text, guard)
        assert [h.head for h in found] == [h for h, yes in enumerate(wanted) if yes] and wanted[
            0
        ] is not guard


def test_vhr_reinforces_from_the_last_position_on() -> None:
    """Each sample its own heads; z × α where and when it is said."""
    model, _ = llava()
    inputs = prompts()
    edit = vhr_for(model, inputs, alpha=3.0)
    assert edit.selected is not None and edit.selected.shape == (2, 4, 8)
    row = vhr_for(model, alone(inputs, 1), alpha=3.0)
    assert row.heads and {(h.layer, h.head) for h in row.heads} == set(
        map(tuple, edit.selected[1].nonzero().tolist())
    )
    first = vhr_for(model, inputs, layers=[0], alpha=3.0, scope="all")
    with torch.no_grad(), model.capture_z() as before:
        model(**inputs)
    with torch.no_grad(), model.edit(first), model.capture_z() as after:
        model(**inputs)
    assert first.selected is not None
    gains = torch.where(first.selected[:, 0], 3.0, 1.0)[:, None, :, None]
    torch.testing.assert_close(after[0], before[0] * gains, atol=1e-6, rtol=1e-6)
    with torch.no_grad(), model.edit(edit), model.capture_z() as prompt:
        model(**inputs)
    assert all(torch.equal(prompt[layer][:, :-1], before[layer][:, :-1]) for layer in range(4))
    gains = torch.where(edit.selected[:, 1], 3.0, 1.0)[..., None]  # layer 1 is the first one
    torch.testing.assert_close(prompt[1][:, -1], before[1][:, -1] * gains, atol=1e-6, rtol=1e-6)


def test_layers_of_vhr_by_family() -> None:
    def model(kind: str, layers: int) -> Any:
        return SimpleNamespace(
            module=SimpleNamespace(config=SimpleNamespace(model_type=kind)),
            n_layers=layers,
            sites=[SimpleNamespace(layer=i, is_main=True) for i in range(layers)],
        )

    assert vhr_layers(model("llava", 32)) == (1, *range(18, 32))
    assert vhr_layers(model("llava_next", 40)) == (1, *range(26, 40))
    assert vhr_layers(model("instructblip", 32)) == tuple(range(14, 32))
    assert vhr_layers(model("qwen2_vl", 28)) == (1, *range(14, 28))
    assert vhr_layers(model("llava", 4)) == (1, 2, 3) and vhr_layers(model("instructblip", 3)) == (
        1,
        2,
    )


TAU = 5.0
#: sample → layer whose output it is planted in → token positions; the image's tokens are 1 … 64
PLANTED = [{0: [0, 68], 1: [9, 10, 33]}, {0: [0], 1: [], 2: [50, 67]}]


@contextmanager
def planted(module: Any, plan: list[dict[int, list[int]]]) -> Iterator[None]:
    """Massive activations in dimensions 7 and 90 of the residual stream, at token positions of each
    sample."""
    with ExitStack() as stack:
        for layer, block in enumerate(module.model.language_model.layers):

            def add(module: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> Any:
                position = kwargs["position_ids"].expand(len(output), -1)
                made = output.clone()
                for row in range(len(made)):
                    here = torch.isin(
                        position[row], torch.tensor(plan[row % len(plan)].get(layer, []) or [-1])
                    )
                    made[row, here, 7] += 90
                    made[row, here, 90] -= 20
                return made

            stack.callback(block.register_forward_hook(add, with_kwargs=True).remove)
        yield


def redistributed(a: torch.Tensor, image: list[int], sinks: list[int], edit: E.VAR) -> torch.Tensor:
    """VAR's formula on the weights a (heads, queries, keys) of a prompt without padding."""
    code, new = edit.preset == "code", a.clone()
    visual = [k for k in sinks if k in image]
    rest = [k for k in image if k not in visual]
    if code and not visual:
        return new
    keep = edit.p if code else 1 - edit.p
    for h in range(a.shape[0]):
        for q in range(max(image) + 1, a.shape[1]):
            row = a[h, q]
            whole, sunk, left = (float(row[keys].sum()) for keys in (image, visual, rest))
            enough = sunk / whole <= edit.rho if code else left / whole >= edit.rho
            if whole >= edit.image_mass and enough:
                freed = float(row[sinks].sum()) * (1 - keep)
                new[h, q, sinks] = row[sinks] * keep
                new[h, q, rest] = row[rest] * (1 + freed / left)
    return new


@torch.no_grad()
def var_by_hand(
    twin: Any, inputs: Any, edit: E.VAR, dims: list[int] | None
) -> tuple[torch.Tensor, list[list[int]]]:
    """(logits (tokens, vocabulary), sinks of each layer) of one prompt."""
    entered: dict[int, torch.Tensor] = {}
    sinks: list[list[int]] = [[] for _ in range(4)]
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()

    def attend(layer: int, q: Any, k: Any, v: Any, sees: Any, scaling: float) -> torch.Tensor:
        a = weights(q, k, sees, scaling)
        x = entered[layer][0].double()
        size = x.abs() / x.pow(2).mean(-1, keepdim=True).sqrt()
        here = dims if dims is not None else (size[0] >= edit.tau).nonzero().flatten().tolist()
        sinks[layer] = [
            t for t in range(len(x)) if any(float(size[t, d]) >= edit.tau for d in here)
        ]
        if sinks[layer] and (layer < 3 or edit.last_layer):
            a = redistributed(a[0], image, sinks[layer], edit)[None]
        return a @ v

    with ExitStack() as stack, attending(twin, attend):
        for layer, block in enumerate(twin.model.language_model.layers):

            def enter(module: Any, args: Any, layer: int = layer) -> None:
                entered[layer] = args[0]

            stack.callback(block.register_forward_pre_hook(enter).remove)
        return twin(**inputs).logits[0], sinks


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": dict(rho=0.85),
    "code": dict(rho=0.1, preset="code"),
    "dims": dict(dims=[90, 7], rho=0.85, p=0.9),
    "one dim": dict(dims=[90], rho=0.5),
    "last layer": dict(rho=0.85, last_layer=True),
}


@pytest.mark.parametrize("which", SETTINGS)
def test_var_finds_sinks_on_the_way_and_redistributes(which: str) -> None:
    model, twin = llava()
    inputs = prompts()
    edit = E.VAR(
        **{"tau": 1.5 if which == "one dim" else TAU, "image_mass": 0.3, **SETTINGS[which]}
    )
    dims = None if edit.dims == "auto" else list(edit.dims)
    inputs["position_ids"] = tiny.positions(inputs["attention_mask"])
    with torch.no_grad(), planted(model.module, PLANTED):
        untouched = model(**inputs).logits
        with model.edit(edit):
            found = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, untouched)
    changed = 0.0
    for row in range(2):
        given = alone(inputs, row)
        with planted(twin, PLANTED[row:]):
            wanted, sinks = var_by_hand(twin, given, edit, dims)
        if which != "one dim":
            assert sinks == ([[], [0, 68], [0, 9, 10, 33, 68], [0, 9, 10, 33, 68]],
                             [[], [0], [0], [0, 50, 67]])[row], sinks  # fmt: skip
        n = len(wanted)
        torch.testing.assert_close(found[row, -n:].double(), wanted.double(), atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(
            found[row, -n:][:60], untouched[row, -n:][:60], atol=1e-5, rtol=1e-5
        )  # the image's
        changed = max(changed, float((found - untouched)[row, -n:].abs().max()))
    assert changed > 1e-3


@pytest.mark.parametrize("start", [None, 67], ids=["whole prompt", "prompt in pieces"])
def test_var_step_by_step_is_one_forward(start: int | None) -> None:
    """New tokens' own massive activations count too: 71 is one."""
    model, _ = llava()
    given, new = alone(prompts(), 0), [7, 8, 9, 10, 11, 12]
    plan = [{0: [0, 66, 71], 1: [20, 33]}]
    whole = {**given, "input_ids": torch.cat([given["input_ids"], torch.tensor([new])], 1)}
    del whole["attention_mask"]
    with (
        torch.no_grad(),
        planted(model.module, plan),
        model.edit(E.VAR(tau=TAU, rho=0.85, image_mass=0.1)),
    ):
        wanted = model(**whole).logits[0, -len(new) - 1 : -1]
        found = stepwise(model, given, new, start)
        lost = torch.tensor([[5]])
        with pytest.raises(EditError, match="read last"):  # a cache of another text
            cache = model.module(**given, use_cache=True).past_key_values
            model(**given)
            cache.layers[0].keys.mul_(2)
            model(input_ids=lost, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_calls_carry_the_stream_only_where_an_edit_needs_it() -> None:
    model, _ = llava()
    inputs, seen = prompts(), {}

    class Spy(Edit):
        def __init__(self, needs: bool):
            self.needs = needs

        @property
        def needs_hidden(self) -> bool:
            return self.needs

        def touches(self, call: Any) -> bool:
            seen[call.site.tower, call.site.layer] = call.hidden
            return False

    with torch.no_grad(), model.edit(Spy(False)):
        model(**inputs)
        assert len(seen) == 8 and all(h is None for h in seen.values())
        with model.edit(Spy(True)), model.capture_resid() as stream:
            model(**inputs)
            for layer in range(4):
                assert seen["vision", layer] is None
                assert torch.equal(seen["text", layer], stream["pre", layer])


def test_published_sink_dimensions() -> None:
    def model(text: Any) -> Any:
        return SimpleNamespace(module=SimpleNamespace(config=hf.LlavaConfig(text_config=text)))

    seven = hf.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    assert published_dims(model(seven)) == (1415, 2533)
    assert published_dims(
        model(hf.LlamaConfig(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40))
    ) == (
        2100,
        4743,
    )
    three = hf.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    assert published_dims(model(three)) is None and published_dims(llava()[0]) is None
    qwen = hf.Qwen2VLConfig(text_config=dict(hidden_size=3584, num_hidden_layers=28))
    assert published_dims(SimpleNamespace(module=SimpleNamespace(config=qwen))) == (458, 2570)  # type: ignore[arg-type]


@torch.no_grad()
def class_weights(twin: Any, pixels: torch.Tensor) -> list[np.ndarray]:
    """(patches,) of each layer: the class token's attention, summed over heads."""
    out = twin.model.vision_tower(pixels, output_attentions=True)
    return [a[0, :, 0, 1:].double().sum(0).numpy() for a in out.attentions]


def test_paint_selects_local_and_summary_patches() -> None:
    model, twin = llava()
    inputs = prompts()
    local, summary = paint_for(model, inputs)
    assert (local.alpha, summary.alpha) == (0.7, 0.35)
    assert {h.layer for h in local.heads or ()} == {2, 3} and len(local.heads or ()) == 16
    outliers = 0
    for row in range(2):
        layers = class_weights(twin, inputs["pixel_values"][row : row + 1])
        low, high = np.percentile(layers[-2], [25, 75])
        best = [p for p in range(64) if layers[-2][p] > high + 1.5 * (high - low)]
        top = [int(p) for p in np.argsort(-layers[0])[:16] if p not in best]
        first = int((inputs["input_ids"][row] == IMAGE).nonzero()[0])
        assert local.keys[row].nonzero().flatten().tolist() == sorted(first + p for p in top)
        assert summary.keys[row].nonzero().flatten().tolist() == [first + p for p in best]
        outliers += len(best)
    assert outliers


def test_paint_with_evenly_spaced_patches() -> None:
    """The released code keeps `arange(0, N − 1, N // int(.05 N))` of an image's patches."""
    assert spatial_patches(576).nonzero().flatten().tolist() == list(range(0, 575, 576 // 28))
    assert spatial_patches(20).nonzero().flatten().tolist() == [0]
    with pytest.raises(InputError, match="at least 20"):
        spatial_patches(19)
    model, _ = llava()
    inputs = prompts()
    (local, summary), (more, same) = (paint_for(model, inputs, spatial=s) for s in (False, True))
    assert torch.equal(summary.keys, same.keys) and more.alpha == local.alpha
    for row in range(2):
        first = int((inputs["input_ids"][row] == IMAGE).nonzero()[0])
        spaced = {first, first + 21, first + 42}  # 3 of 64
        before, after = (set(e.keys[row].nonzero().flatten().tolist()) for e in (local, more))
        assert after == before | (spaced - set(summary.keys[row].nonzero().flatten().tolist()))
        assert after > before


def test_attention_of_the_class_token() -> None:
    model, twin = llava()
    inputs = prompts()
    found = cls_attention(model, inputs, (0, -1))
    wide = cls_attention(model, inputs, (1,), "width").attention[1]
    for row in range(2):
        layers = class_weights(twin, inputs["pixel_values"][row : row + 1])
        for layer in (0, -1):
            np.testing.assert_allclose(
                found.attention[layer][row], layers[layer], atol=1e-5, rtol=1e-4
            )
        store: dict[str, torch.Tensor] = {}
        attention = twin.model.vision_tower.encoder.layers[1].self_attn
        with torch.no_grad(), ExitStack() as stack:
            for name in ("q_proj", "k_proj"):

                def keep(
                    module: Any, args: Any, output: Any, name: str = name, store: Any = store
                ) -> None:
                    store[name] = output[0].double()

                stack.callback(getattr(attention, name).register_forward_hook(keep).remove)
            twin.model.vision_tower(inputs["pixel_values"][row : row + 1])
        a = torch.softmax(store["q_proj"][0] @ store["k_proj"].T * 128**-0.5, -1)[1:]
        torch.testing.assert_close(wide[row].double(), a, atol=1e-5, rtol=1e-4)


# --- all of them, while text is written
# ---------------------------------------------------------------------------


def edits_for(inputs: Any) -> list[Edit]:
    model, _ = llava()
    return [
        vhr_for(model, inputs),
        E.VAR(tau=TAU, rho=0.85, image_mass=0.1),
        *paint_for(model, inputs),
    ]


@pytest.mark.parametrize("how", HOW)
def test_generation_in_batches_is_step_by_step_alone(how: str) -> None:
    model, _ = llava()
    inputs = prompts()
    plan = [{0: [0], 1: [20, 33]}]
    with planted(model.module, plan):
        found = generated(inputs, how, model.edit(*edits_for(inputs)))
        plain = generated(inputs, how)
        for row, new, logits, _ in found:
            given = alone(inputs, row)
            with model.edit(*edits_for(given)):
                wanted = stepwise(model, given, new)
            torch.testing.assert_close(logits, wanted, atol=3e-4, rtol=3e-4)
    assert any(float((a[2] - b[2]).abs().max()) > 1e-2 for a, b in zip(found, plain, strict=True))
    assert model.observers_and_edits() == ([], [])


def test_new_tokens_sinks_go_with_their_beams() -> None:
    """Which tokens are sinks is planted by the token itself, so that beams differ."""
    model, _ = llava()
    inputs = prompts()

    def add(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        position = kwargs["position_ids"].expand(len(output), -1)
        massive = (position == 0) | (position == 30) | ((position > 64) & (output[..., 0] > 0))
        return output + massive[..., None] * torch.nn.functional.one_hot(torch.tensor(7), 128) * 90

    handle = model.module.model.language_model.layers[0].register_forward_hook(
        add, with_kwargs=True
    )
    try:
        edit = E.VAR(tau=TAU, rho=0.5, image_mass=0.1)
        for row, new, logits, _ in generated(inputs, "beams", model.edit(edit)):
            with model.edit(edit):
                wanted = stepwise(model, alone(inputs, row), new)
            torch.testing.assert_close(logits, wanted, atol=3e-4, rtol=3e-4)
    finally:
        handle.remove()


def test_identities_are_bit_equal() -> None:
    model, _ = llava()
    inputs = prompts()
    with torch.no_grad():
        wanted = model(**inputs).logits
        for edit in (
            vhr_for(model, inputs, alpha=1.0),
            E.VAR(p=0.0, tau=TAU),
            E.VAR(p=1.0, preset="code", tau=TAU),
            *paint_for(model, inputs, 0.0, 0.0),
        ):
            assert edit.is_identity()
            with model.edit(edit):
                assert torch.equal(model(**inputs).logits, wanted)


# --- what can't be done
# -------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, _ = llava()
    inputs = prompts()
    text = hook(tiny.build("llama"), name="tiny-llama")
    words: Any = dict(without_images(model, inputs), pixel_values=inputs["pixel_values"])
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    blind = {k: v for k, v in inputs.items() if k != "pixel_values"}
    for make in (vhr_for, paint_for):
        for given, who, says in (
            (inputs, text, "takes no images"),
            (words, model, "has none"),
            (right, model, "pad on the left"),
            (blind, model, "pixel_values"),
            ({}, model, "input_ids"),
        ):
            with pytest.raises(InputError, match=says):
                make(who, given)
    with pytest.raises(HeadError):
        vhr_for(model, inputs, layers=[4])
    with pytest.raises(InputError, match="from 4 on"):
        paint_for(model, inputs, first_layer=4)
    with pytest.raises(InputError, match="4 layers"):
        cls_attention(model, inputs, (4,))
    with pytest.raises(EditError, match="smaller tau"), model.edit(E.VAR(tau=20.0)):
        pass
    with pytest.raises(EditError, match="name 128"), model.edit(E.VAR(dims=[128], tau=2.0)):
        pass
    with torch.no_grad(), model.edit(E.VAR(tau=TAU)), pytest.raises(EditError, match="has none"):
        model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    only = torch.full((1, 64), IMAGE)
    with pytest.raises(InputError, match="nothing else"):
        vhr_for(model, dict(input_ids=only, pixel_values=inputs["pixel_values"][:1]))


@pytest.mark.parametrize("name", ["llava_next", "paligemma", "qwen2_vl", "internvl"])
def test_other_families(name: str) -> None:
    """VHR's choice is what capturing z says; patches of towers without class token, or merged ones,
    are refused."""
    module, given = tiny_vision.build(name)
    model = hook(module, sample=given, name=name)
    found = select_heads(model, given)
    with torch.no_grad(), model.capture_z() as seen:
        model(**given)
    with torch.no_grad(), model.capture_z() as bare:
        model(**without_images(model, given))
    difference = (seen[1][0, -1] - bare[1][0, -1]).norm(dim=-1)
    torch.testing.assert_close(found.divergence[0, 1], difference, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="one token a patch"):
        paint_for(model, given, first_layer=0)


@pytest.mark.parametrize("kind", ["paint", "vhr", "var"])
def test_a_text_that_ends_before_the_others(kind: str) -> None:
    """Rows of texts that have ended are nobody's: the other text goes on as it would alone."""
    model, _ = llava()

    def made(given: Any) -> Any:
        made = dict(
            paint=lambda: paint_for(model, given),
            vhr=lambda: (vhr_for(model, given),),
            var=lambda: (E.VAR(tau=1.5),),
        )
        return made[kind]()

    inputs, new = prompts(), 5
    apart = []
    for row in range(2):
        with model.edit(*made(alone(inputs, row))):
            out = model.generate(**alone(inputs, row), max_new_tokens=new, do_sample=False)
        apart.append(out[0, -new:].tolist())
    first, end = next(
        (row, t) for row in range(2) for t in apart[row][:-1] if t not in apart[1 - row]
    )
    with model.edit(*made(inputs)):
        out = model.generate(
            **inputs, max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=3
        )
    said = apart[first][: apart[first].index(end) + 1]
    assert out[first, -new:].tolist() == [*said, *[3] * (new - len(said))]
    assert out[1 - first, -new:].tolist() == apart[1 - first]
