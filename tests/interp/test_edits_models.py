"""Edits of tiny models: against eager attention edited by the definition, joined, undone, and step
by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from edit_definitions import Attention, z_of
from prompts import LENGTH, inputs_for, left_padded, tokens

from interp import edits as E
from interp_hooks import HookedModel
from interp_hooks.edit import Edit
from interp_hooks.errors import EditError

MODELS = ["llama", "gemma2", "gpt_oss", "mistral"]
Tapped = Callable[[str], tuple[HookedModel, Any]]
GENERATOR = torch.Generator().manual_seed(5)
TENSOR = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.3

ROUTER = torch.randn(2, 4 + 2, 32, generator=torch.Generator().manual_seed(5))

#: edits whose scope is all rows, prompt and generated
EVERYWHERE: dict[str, list[Edit]] = {
    "scale_heads": [E.ScaleHeads({"0.1": -1.0, "1.3": 2.0}, queries=(2, 10))],
    "shift_heads": [
        E.ShiftHeads({"0.1": [0.5] * 8, "1.3": np.linspace(-2, 1, 8)}, 0.7, queries=(2, 10))
    ],
    "ablate": [E.Ablate("0.2, 1.0", queries=(3, None))],
    "uniform": [E.Ablate("0.2, 1.0", "uniform")],
    "scale_tokens": [
        E.ScaleTokens([1, 2, 5], 4.0, "0.0, 1.2"),
        E.ScaleTokens(TENSOR, 0.0, queries=(1, 11)),
    ],
    "spotlight": [
        E.SpotLight([1, 2, 5], 0.5, "0.0, 1.2"),
        E.SpotLight(TENSOR, 0.9, queries=(1, 11)),
    ],
    "seka": [
        E.SEKA([1, 2, 5], ["0.1", "1.0"], torch.randn(2, 8, 8, generator=GENERATOR), 0.8),
        E.SEKA(TENSOR, ["1.1"], torch.eye(8)[None], -0.4),
    ],
    "zero_tuning": [E.ZeroTuning({"0.0": 0.2, "0.3": 5.0, "1.1": 2.0})],
    "move_mass": [E.MoveMass("initial", (3, 6), 0.7, "0.1, 1.1, 1.2")],
    "var": [
        E.VAR((1, 4), "initial", [2], rho=0.3, image_mass=0.05),
        E.VAR((2, 6), None, (2, 4), preset="code"),
    ],
    "temperature": [
        E.Temperature({"0.1": 0.5, "1.0": 3.0}),
        E.Temperature(rule="ssa", beta=0.3, heads="1.2"),
    ],
    "soft_pag": [E.SoftPAG(0.4, "0.0, 1.3")],
    "rotate_heads": [E.RotateHeads({"0.1": [0.5] * 8, "1.3": np.linspace(-2, 1, 8)}, 1.5)],
    "streaming": [E.Streaming(2, 3)],
    "sharded": [E.Sharded(2, 2, 3, "0.0, 0.2, 1.0, 1.1, 1.2, 1.3")],
    "hierarchical_topk": [E.HierarchicalTopk(4, 1, 1, 1, 2)],
    "gate": [E.Gate({"0.1": 0.0, "1.0": 0.6}, 1, 2)],
    "head_gate": [E.HeadGate(1, 0.25)],
    "routed_heads": [E.RoutedHeads(ROUTER, 1, 0.25)],
    "routed_heads, straight": [E.RoutedHeads(ROUTER, 2, 0.0, straight=True)],
    "sigmoid_attention": [E.SigmoidAttention(length=9)],
    "softplus": [E.SoftplusReweight(None, "0.1, 1.2"), E.SoftplusReweight(3, "0.0")],
}
PROMPT: dict[str, list[Edit]] = {
    "act": [E.ACT(0.3, alpha=2.0, heads="0.1, 0.2, 1.0")],
    "act, absolute": [E.ACT(0.0, threshold=0.15)],
    "overwrite_row": [
        E.OverwriteRow("0.1, 1.2", [[1, 3], [4]]),
        E.OverwriteRow("0.3, 1.0", [[0, 5]], [0.25, -1.5], query=[9, 6]),
    ],
    "paint": [E.PAINT([1, 2, 3], {"0.2": 1.5, "1.1": 0.5})],
}
JOINED: dict[str, list[Edit]] = {
    "rules": [
        *EVERYWHERE["move_mass"],
        E.ZeroTuning(3.0, "0.1, 1.2"),
        E.ACT(0.2, 1.5),
        E.SoftPAG(0.3, "1.1"),
    ],
    "all kinds": [
        E.Streaming(1, 5),
        E.Temperature(0.7, "0.0"),
        *EVERYWHERE["var"],
        E.ScaleHeads({"1.2": 3.0}),
    ],
    "gate after rules": [E.MoveMass([2], [1, 4]), E.Gate(0.5, 1, 3), E.VHR("1.0", scope="all")],
}
IDENTITIES: list[Edit] = [
    E.ScaleHeads({"0.0": 1.0}),
    E.Ablate([]),
    E.ScaleTokens("initial", 1),
    E.ScaleTokens("initial", 5.0, []),
    E.ZeroTuning({"0.1": 1.0, "1.1": 1}),
    E.MoveMass("initial", [2], 0.0),
    E.ACT(1.0),
    E.VAR((1, 4), "initial", p=0.0),
    E.VAR((1, 4), "initial", p=1.0, preset="code"),
    E.VHR("0.0", 1.0),
    E.Temperature(1.0),
    E.SoftPAG(0),
    E.PAINT([1], 0.0),
    E.Streaming(heads=()),
    E.Gate(1.0),
    E.Gate(torch.ones(2, 2)),
    E.HeadGate(0.5, 0.5),
    E.SigmoidAttention(heads=()),
    E.SoftplusReweight(heads=()),
    E.SEKA("initial", ["0.0"], torch.eye(8)[None], 0.0),
    E.ZeroTuning(3.0, queries=(4, 4)),
]


def refused(name: str, kind: str) -> bool:
    """Sink logits are a share of a softmax; these have none."""
    return name == "gpt_oss" and kind in ("sigmoid_attention", "softplus")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def defined(plain: Any, edits: Sequence[Edit], mask: torch.Tensor) -> Iterator[None]:
    """The model with an attention function of the test's own: whole matrices, float64, the edits by
    definition."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def function(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        slots, layer = torch.arange(mask.shape[1]), module.layer_idx
        token = slots - mask.int().argmax(1)[:, None]
        sees = (attention_mask > -1) if attention_mask is not None else slots <= slots[:, None]
        x = Attention(
            layer, query, key, value, sees & mask.bool()[:, None, None], token, token, slots, slots,
            kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux"),
            tiny.window_of(module.config, layer) is not None, hidden=streams.get(layer),
            turn=partial(tiny.turns, plain, layer),
        )  # fmt: skip
        return z_of(x, edits).to(value.dtype), None

    streams: dict[int, torch.Tensor] = {}

    def enter(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            streams[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    blocks = getattr(plain.model, "layers", ())
    handles = [
        b.register_forward_pre_hook(enter(n), with_kwargs=True) for n, b in enumerate(blocks)
    ]
    AttentionInterface.register("defined_in_the_test", function)
    AttentionMaskInterface.register("defined_in_the_test", eager_mask)
    before = plain.config._attn_implementation
    plain.set_attn_implementation("defined_in_the_test")
    try:
        yield
    finally:
        plain.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, *blocks: Any) -> torch.Tensor:
    return model(**inputs_for(model, ids, mask)).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_test_s_own_attention_is_the_model_s(tapped: Tapped, name: str) -> None:
    model, plain = tapped(name)
    ids, mask = tokens(), left_padded(True)
    wanted = logits(model, ids, mask)
    with torch.no_grad(), defined(plain, [], mask):
        found = plain(**inputs_for(model, ids, mask)).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*EVERYWHERE, *PROMPT, *JOINED])
@pytest.mark.parametrize("name", MODELS)
def test_against_eager_attention_edited_by_the_definition(
    tapped: Tapped, name: str, kind: str
) -> None:
    """In one block and in nested ones; and the model is its own again afterwards."""
    model, plain = tapped(name)
    edits = {**EVERYWHERE, **PROMPT, **JOINED}[kind]
    ids, mask = tokens(), left_padded(True)
    real, untouched = mask.bool(), logits(model, ids, mask)
    if refused(name, kind):
        with pytest.raises(EditError, match="sink"), model.edit(*edits):
            logits(model, ids, mask)
        return
    with torch.no_grad(), defined(plain, edits, mask):
        wanted = plain(**inputs_for(model, ids, mask)).logits
    with model.edit(*edits):
        found = logits(model, ids, mask)
    torch.testing.assert_close(found[real], wanted[real], atol=2e-4, rtol=2e-4)
    if not (
        name == "mistral" and kind in ("streaming", "gate", "sharded", "hierarchical_topk")
    ):  # its layers all have sliding windows
        assert float((found - untouched)[real].abs().max()) > 1e-3
    assert torch.equal(logits(model, ids, mask), untouched)
    if len(edits) > 1:
        with model.edit(edits[0]), model.edit(*edits[1:]):
            assert torch.equal(logits(model, ids, mask), found)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_identities_are_bit_equal(tapped: Tapped, name: str) -> None:
    model, _ = tapped(name)
    ids, mask = tokens(), left_padded(False)
    untouched = logits(model, ids, mask)
    for edit in IDENTITIES:
        assert edit.is_identity(), edit
        with model.edit(edit):
            assert torch.equal(logits(model, ids, mask), untouched)


#: of all heads of a layer
WHOLE = ("head_gate", "routed_heads", "sigmoid_attention")


@pytest.mark.parametrize(
    "kind", [k for k in (*EVERYWHERE, *PROMPT) if k.split(",")[0] not in WHOLE]
)
def test_other_heads_keep_their_z(tapped: Tapped, kind: str) -> None:
    """In the first layer; later ones read a changed stream."""
    model, _ = tapped("llama")
    few = {
        "var": [E.VAR((1, 4), "initial", [2], rho=0.1, image_mass=0.01, heads="0.1")],
        "streaming": [E.Streaming(heads=())],
        "hierarchical_topk": [E.HierarchicalTopk(4, 1, 1, 1, 2, "0.1")],
        "scale_tokens": [E.ScaleTokens([1, 2], 9.0, "0.1")],
        "spotlight": [E.SpotLight([1, 2], 0.9, "0.1")],
        "act, absolute": [E.ACT(0, threshold=0.1, heads="0.1")],
    }
    edits = few.get(kind) or {**EVERYWHERE, **PROMPT}[kind]
    ids, mask = tokens(), left_padded(True)
    with model.capture_z() as before:
        logits(model, ids, mask)
    with model.edit(*edits), model.capture_z() as after:
        logits(model, ids, mask)
    site = model.sites[0]
    if kind == "gate":
        touched = {2, 3}  # the query heads of KV head 1
    else:
        touched = (
            {h for e in edits for h in e.heads_at(site)}
            if all(e.at(site) for e in edits)
            else set()
        )
        touched |= {h for e in edits if e.at(site) for h in e.heads_at(site)}
    others = [h for h in range(4) if h not in touched]
    assert others
    torch.testing.assert_close(
        after[0][:, :, others], before[0][:, :, others], atol=1e-5, rtol=1e-5
    )


# --- prefill and decode
# -------------------------------------------------------------------------------------------


@torch.no_grad()
def stepwise(
    model: HookedModel, ids: torch.Tensor, mask: torch.Tensor, first: int = 8
) -> torch.Tensor:
    given, cache, parts = inputs_for(model, ids, mask), None, []
    for a, b in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        step = {k: v[:, a:b] for k, v in given.items()} | dict(attention_mask=mask[:, :b])
        out = model(**step, past_key_values=cache, use_cache=True)
        cache, _ = out.past_key_values, parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_is_one_forward(tapped: Tapped, name: str, kind: str) -> None:
    model, _ = tapped(name)
    if refused(name, kind):
        return
    ids, mask = tokens(), left_padded(True)
    real = mask.bool()
    with model.edit(*EVERYWHERE[kind]):
        whole, steps = logits(model, ids, mask), stepwise(model, ids, mask)
    torch.testing.assert_close(steps[real], whole[real], atol=2e-4, rtol=2e-4)


HOW: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, top_k=0),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_generation_is_one_forward(tapped: Tapped, name: str, how: str) -> None:
    """The logits that each token was chosen by are those of a forward over what was generated."""
    model, _ = tapped(name)
    ids, mask, new = tokens(length=9), left_padded(True, 9), 5

    def edits(keys: torch.Tensor) -> list[Edit]:
        return [
            *EVERYWHERE["var"],
            E.ZeroTuning(2.5),
            E.ScaleTokens(keys, 0.2, "0.1"),
            E.SoftPAG(0.3, "1.0"),
            E.Temperature(rule="ssa", beta=0.2),
            E.HeadGate(1, 0.5),
            E.Gate({"0.0": 0.2}, 1, 3),
        ]

    keys = TENSOR[:, :9]
    torch.manual_seed(0)
    with torch.no_grad(), model.edit(*edits(keys)):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **HOW[how],
        )
        each = len(out.sequences) // 2
        whole = torch.cat(
            [mask.repeat_interleave(each, 0), torch.ones(2 * each, new, dtype=torch.long)], 1
        )
    # the rows of a forward of one's own are other samples, each with keys of its own
    with torch.no_grad(), model.edit(*edits(keys.repeat_interleave(each, 0))):
        full = logits(model, out.sequences, whole)
    for row in range(2 * each):
        for step in range(new):
            beam = int(out.beam_indices[row, step]) if how == "beams" else row
            torch.testing.assert_close(
                out.logits[step][beam], full[row, 8 + step], atol=2e-4, rtol=2e-4
            )


def test_scopes_of_prompt_edits(tapped: Tapped) -> None:
    """ACT ends with the prompt; VHR and PAINT edit the prompt's last row and every later one."""
    model, plain = tapped("llama")
    ids, mask = tokens(), left_padded(True)
    given = inputs_for(model, ids, mask)

    @torch.no_grad()
    def z(*edits: Edit) -> torch.Tensor:
        with model.edit(*edits), model.capture_z() as z:
            stepwise(model, ids, mask, LENGTH - 2)
        return z[0]

    before = z()
    act, vhr, paint = (
        z(E.ACT(0.0, 1.5, heads="0.0")),
        z(E.VHR("0.1", 3.0)),
        z(E.PAINT([0, 1, 2], 2.0)),
    )
    assert torch.equal(act[:, -2:], before[:, -2:]) and not torch.allclose(
        act[:, :-2], before[:, :-2], atol=1e-3
    )
    late = z(E.VHR("0.1", 3.0, first=False))
    for found, start in ((vhr, -3), (late, -2)):
        assert torch.equal(found[:, :start], before[:, :start])
        torch.testing.assert_close(found[:, start:, 1], 3 * before[:, start:, 1])
    changed = (paint - before).abs().amax((0, 2, 3)) > 1e-4
    assert changed.nonzero().ravel().tolist() == [LENGTH - 3, LENGTH - 2, LENGTH - 1]
    assert plain is not None and given["input_ids"].shape[1] == LENGTH


def parameter(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


PARAMETERS: dict[str, tuple[Any, Callable[[torch.Tensor], Edit]]] = {
    "zero_tuning": (1.7, lambda t: E.ZeroTuning({"0.0": t, "1.2": 2.0})),
    "zero_tuning, all heads": (1.0, lambda t: E.ZeroTuning(t)),
    "scale_heads": (0.6, lambda t: E.ScaleHeads({"0.3": t, "1.1": t})),
    "shift_heads": (0.6, lambda t: E.ShiftHeads({"0.3": t.expand(8), "1.1": t.expand(8)})),
    "rotate_heads": ([0.6, -0.2, 1, 0, 0, 2, 1, 0.3], lambda t: E.RotateHeads({"0.3": t})),
    "spotlight": (0.6, lambda t: E.SpotLight([1, 3], t, "0.1, 1.0")),
    "scale_tokens": (2.0, lambda t: E.ScaleTokens([1, 3], t, "0.1, 1.0")),
    "move_mass": (0.4, lambda t: E.MoveMass("initial", (2, 6), t, queries=(4, None))),
    "temperature": (1.3, lambda t: E.Temperature(t)),
    "seka": (0.7, lambda t: E.SEKA([1, 3], ["0.1", "1.0"], torch.ones(2, 8, 8), t)),
    "soft_pag": (0.3, lambda t: E.SoftPAG({"0.1": t, "1.2": 0.5})),
    "vhr": (2.0, lambda t: E.VHR("0.1", t, "all")),
    "gate": ([[0.2, 0.9], [0.5, 1.0]], lambda t: E.Gate(t.repeat_interleave(2, 1), 1, 3)),
    "gate, one": (0.5, lambda t: E.Gate({"1.1": t}, 1, 3)),
    "act": (0.4, lambda t: E.ACT(t, alpha=1.1)),
    "paint": (0.7, lambda t: E.PAINT([1, 2], t)),
    "routed_heads": (
        [0.3, -0.5, 0.1, 0.7, -0.2, 0.4],
        lambda t: E.RoutedHeads(ROUTER.double() * t[:, None], 2, 0.5),
    ),
}


@pytest.fixture(scope="module")
def double() -> HookedModel:
    from interp_hooks import hook

    return hook(tiny.build("gpt2").double())  # Llama's norm computes in float32


@pytest.mark.parametrize("kind", PARAMETERS)
def test_gradients_against_finite_differences(double: HookedModel, kind: str) -> None:
    value, make = PARAMETERS[kind]
    ids, mask = tokens(length=8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :2] = 0
    weight = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(edit: Edit) -> torch.Tensor:
        with double.edit(edit):
            return (double(**inputs_for(double, ids, mask)).logits[:, -1] @ weight).sum()

    t = parameter(value)
    edit = make(t)
    assert not edit.is_identity() and (not isinstance(edit, E.Gate) or len(edit.parameters) == 1)
    (found,) = torch.autograd.grad(loss(edit), t)
    for index in range(t.numel()):
        step = torch.zeros(t.numel(), dtype=torch.float64)
        step[index] = 1e-5
        if kind == "gate" and float(t.detach().ravel()[index]) == 1.0:
            step = -step  # α stays in 0 … 1
            with torch.no_grad():
                one, two = (loss(make(t.detach() + n * step.view_as(t))) for n in (1, 2))
                slope = (3 * loss(make(t.detach())) - 4 * one + two) / 2e-5
        else:
            with torch.no_grad():
                up, down = (loss(make(t.detach() + s * step.view_as(t))) for s in (1, -1))
                slope = (up - down) / 2e-5
        assert abs(float(slope)) > 1e-6
        torch.testing.assert_close(found.ravel()[index], slope, atol=1e-6, rtol=1e-4)
