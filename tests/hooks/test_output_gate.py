"""z is what W_O reads, in every architecture of transformers that does something to it first.

The definition is a hook on the output projection of an untouched model; the tap is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import build as build_tiny
from tiny_gated import GATED, NORMED, SECOND, build

import interp
from interp.edits import Ablate, Gate, ScaleHeads
from interp.errors import TapError
from interp_hooks import Edit, hook
from interp_kernels import Steer


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], tuple[Any, Any]]:
    cache: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in cache:
            module = build({**GATED, **SECOND}[name], name)
            cache[name] = module, interp.load(module)
        return cache[name]

    return get


def turn_of(model: Any, site: Any) -> int:
    """Which call of its module a site is, where layers share one."""
    return [s for s in model.sites if s.path == site.path].index(site)


def projection(model: Any, site: Any) -> torch.nn.Module:
    """The output projection under the attention module of a site."""
    return next(
        m for path, m in model.get_submodule(site.path).named_modules() if path.endswith("o_proj")
    )


@contextmanager
def reading(
    module: torch.nn.Module,
    write: Callable[[torch.Tensor], torch.Tensor] | None = None,
    turn: int | None = None,
) -> Iterator[list[torch.Tensor]]:
    """What a projection reads, replaced by `write`'s answer (in its call number `turn` alone)."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: tuple) -> tuple | None:
        seen.append(args[0].detach().clone())
        if write is None or turn not in (None, len(seen) - 1):
            return None
        return (write(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def ids(seed: int = 0, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (2, length), generator=generator)


def answer(model: Any, **inputs: Any) -> torch.Tensor:
    out = model(**inputs, use_cache=False) if "use_cache" not in inputs else model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


NAMES = list(GATED)


@torch.no_grad()
@pytest.mark.parametrize("name", [*GATED, *SECOND])
def test_z_is_what_the_output_projection_reads(loaded: Any, name: str) -> None:
    module, model = loaded(name)
    sites = [site for site in model.sites if site.is_main]
    assert [s.output_gate for s in sites] == [name not in NORMED] * len(sites)
    with model.capture_z() as z, model.observe("entropy"):
        tapped = answer(model, input_ids=ids())
    for site in sites:
        with reading(projection(module, site)) as read:
            plain = answer(module, input_ids=ids())
        own = read[turn_of(model, site)]
        torch.testing.assert_close(z[site.layer].flatten(2), own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tapped, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*GATED, *SECOND])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_edits_of_z_are_made_at_the_output_projection(
    loaded: Any, name: str, factor: float
) -> None:
    module, model = loaded(name)
    site = [s for s in model.sites if s.is_main][-1]
    edit = Ablate([(site.layer, 1)]) if factor == 0 else ScaleHeads({(site.layer, 1): factor})

    def write(read: torch.Tensor) -> torch.Tensor:
        by_head = read.reshape(*read.shape[:-1], site.n_heads, -1).clone()
        by_head[..., 1, :] *= factor
        return by_head.reshape(read.shape)

    with reading(projection(module, site), write, turn_of(model, site)):
        wanted = answer(module, input_ids=ids())
    with model.edit(edit), model.capture_z() as z:
        given = answer(model, input_ids=ids())
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert float((given - answer(module, input_ids=ids())).abs().max()) > 1e-4
    with reading(projection(module, site)) as read:
        answer(module, input_ids=ids())
    wanted = write(read[turn_of(model, site)])
    torch.testing.assert_close(z[site.layer].flatten(2), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_heads_through_their_weights_are_the_layers_output(loaded: Any, name: str) -> None:
    module, model = loaded(name)
    site = [s for s in model.sites if s.is_main][-1]
    try:
        weights = model.head_weights(site.layer)
    except TapError as refusal:  # latent attention has no W_Q, W_K, W_V by head
        assert "projections" in str(refusal) and name == "bailing_hybrid"
        return
    outputs: list[torch.Tensor] = []
    handle = projection(module, site).register_forward_hook(lambda m, a, out: outputs.append(out))
    with model.capture_z() as z:
        answer(model, input_ids=ids())
    handle.remove()
    total = weights.result(z[site.layer]).sum(2)
    total = total + (0 if weights.b_O is None else weights.b_O)
    torch.testing.assert_close(total, outputs[0], rtol=1e-4, atol=1e-5)
    assert weights.W_Q.shape == (site.n_heads, 32, site.d_head)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_queries_come_without_their_gate(loaded: Any, name: str) -> None:
    """Qwen3-Next's q_proj makes, head by head, a query and a gate."""
    module, model = loaded(name)
    attention = module.get_submodule(model.sites[0].path)
    seen: dict[str, torch.Tensor] = {}
    raw: list[torch.Tensor] = []
    handle = attention.q_proj.register_forward_hook(lambda m, a, out: raw.append(out))
    with model.projections(lambda place, layer, t: seen.__setitem__(place, t)):
        answer(model, input_ids=ids())
    handle.remove()
    own = raw[0].unflatten(-1, (4, 16)).chunk(2, -1)[0]
    assert torch.equal(seen["q"], own)


def gate_of(name: str, attention: Any, x: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, heads) mean of the gate, written down from the architecture."""
    if name.startswith("qwen3"):
        gate = attention.q_proj(x).unflatten(-1, (4, 16)).chunk(2, -1)[1]
        return gate.sigmoid().mean(-1)
    linear = attention.g_proj if hasattr(attention, "g_proj") else attention.gate_proj
    logits = linear(x).unflatten(-1, (4, -1))
    if name == "beam":
        logits = logits + attention.gate_bias[:, None]
    squash = torch.nn.functional.softplus if name.startswith("laguna") else torch.sigmoid
    return squash(logits).mean(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in NAMES if n not in NORMED])
def test_the_gate_is_the_architectures(loaded: Any, name: str) -> None:
    module, model = loaded(name)
    site = [s for s in model.sites if s.is_main][-1]
    attention = module.get_submodule(site.path)
    given: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda m, args, kw: given.append(kw.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    answer(module, input_ids=ids())
    handle.remove()
    wanted = gate_of(name, attention, given[0]).transpose(1, 2)
    with model.observe("gate") as seen:
        answer(model, input_ids=ids())
    torch.testing.assert_close(seen[site.layer].gate, wanted, rtol=1e-4, atol=1e-6)
    with model.edit(Ablate([(site.layer, 0)])), model.observe("gate", stage="after") as seen:
        answer(model, input_ids=ids())  # a gate depends on the layer's input alone
    torch.testing.assert_close(seen[site.layer].gate, wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_gain_of_the_kernels_waits_for_the_projection(loaded: Any) -> None:
    """BitNet norms all heads together, so a factor before the norm is not one after it."""

    class Gain(Edit):
        def touches(self, call: Any) -> bool:
            return True

        def steer(self, call: Any, measure: Any) -> Steer:
            return Steer(gain=torch.tensor([1.0, 1.0, 0.3, 1.0])[None, :, None])

    _, model = loaded("bitnet")
    with model.edit(Gain()):
        given = answer(model, input_ids=ids())
    with model.edit(ScaleHeads({(0, 2): 0.3, (1, 2): 0.3})):
        wanted = answer(model, input_ids=ids())
    torch.testing.assert_close(given, wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "laguna"])
def test_another_attention_is_gated_as_well(loaded: Any, name: str) -> None:
    """An edit that attends anew (streaming, α = 0) gives what comes before the gate: with a window
    of everything it changes nothing."""
    module, model = loaded(name)
    with model.edit(Gate(0.5, sink=4, recent=64)):
        given = answer(model, input_ids=ids())
    torch.testing.assert_close(given, answer(module, input_ids=ids()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "laguna"])
def test_decode_steps_are_those_of_one_forward(loaded: Any, name: str) -> None:
    _, model = loaded(name)
    row = ids()[:1]
    layer = model.sites[-1].layer
    with model.capture_z() as whole, model.observe("gate") as seen:
        answer(model, input_ids=row)
    with model.capture_z() as steps, model.observe("gate") as stepped:
        out = model(input_ids=row[:, :9], use_cache=True)
        for i in range(9, 12):
            out = model(
                input_ids=row[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
    torch.testing.assert_close(steps[layer], whole[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepped[layer].gate, seen[layer].gate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "muse_spark"])
def test_gradients_of_z_are_those_at_the_projection(loaded: Any, name: str) -> None:
    module, model = loaded(name)
    site = [s for s in model.sites if s.is_main][-1]
    leaf: list[torch.Tensor] = []

    def write(read: torch.Tensor) -> torch.Tensor:
        leaf.append(read.detach().requires_grad_())
        return leaf[0]

    with reading(projection(module, site), write):
        answer(module, input_ids=ids())[0, -1].sum().backward()
    with model.activations("z") as kept:
        total = answer(model, input_ids=ids())[0, -1].sum()
    (gradient,) = torch.autograd.grad(total, [kept["z", site.layer]])
    assert leaf[0].grad is not None
    torch.testing.assert_close(gradient.flatten(2), leaf[0].grad, rtol=1e-3, atol=1e-5)


def test_models_without_a_gate_have_none_to_observe() -> None:
    model = hook(build_tiny("llama"))
    with pytest.raises(TapError, match="no output gate"), model.observe("gate"):
        pass


@torch.no_grad()
def test_direct_contributions_of_heads_are_made_of_gated_outputs(loaded: Any) -> None:
    """z_h W_O,h through the final norm, frozen, and all parts together the logits' own."""
    module, model = loaded("laguna")
    directions = model.vocabulary().W_U[:, [4, 90]].T
    found = interp.mechanics.direct(model, ids(), None, directions)
    torch.testing.assert_close(found.sum(), found.total, atol=1e-4, rtol=1e-4)
    final: list[torch.Tensor] = []
    handle = module.model.norm.register_forward_pre_hook(lambda m, args: final.append(args[0]))
    with reading(projection(module, model.sites[1])) as read:
        answer(module, input_ids=ids())
    handle.remove()
    norm, x = module.model.norm, final[0][:, -1].double()
    scale = (
        norm.weight.double() / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    )
    weight = projection(module, model.sites[1]).weight.double()
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        written = read[0][:, -1, part].double() @ weight[:, part].T * scale
        torch.testing.assert_close(
            found.heads[1][:, head], (written * directions.double()).sum(-1), atol=1e-5, rtol=1e-4
        )
