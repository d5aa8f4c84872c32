"""RelP and GIM: forwards unchanged bit by bit, relevance conserved, exact where the model is
linear, softmax's gradient by its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from prompts import hooked_transformer
from split_stream import RMS, exact
from test_circuit_gradients import bench_of, hooked, inputs, instances, lens_bench, margins, values

from interp.circuits.methods.attribution import Attribution, first_order
from interp.circuits.methods.gim import GIM
from interp.circuits.methods.relp import RelP
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written
from interp.circuits.runs.relevance import check_rules
from interp.errors import InputError, TapError
from interp.streams.backward import RELEVANCE, Rules, ruled, softened
from interp_hooks import Head, hook

NAMES = ["llama", "gpt2", "gemma2", "olmo2", "neox"]


def runs_of(name: str, n: int = 2) -> PairedRuns:
    return lens_bench() if name == "lens" else bench_of(name, n)


@pytest.mark.parametrize("rules", [RELEVANCE, GIM(gates=True).rules], ids=["relp", "gim"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "lens"])
def test_the_forward_is_the_models_own_bit_by_bit(name: str, rules: Rules) -> None:
    runs = runs_of(name)
    (pairs,) = runs.batches(gradients=True)
    module = runs.model.module
    flags = [p.requires_grad for p in module.parameters()]
    before = [set(vars(m)) for m in module.modules()]
    module.requires_grad_(False)  # as in the block: PyTorch picks kernels by it
    try:
        keep = ("q", "v", "z", "pre", "post", "final")
        wanted, own = runs.live(pairs, keep)
        with ruled(runs.model, rules):
            found, kept = runs.live(pairs, keep)
    finally:
        for parameter, flag in zip(module.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    assert torch.equal(found, wanted) and own.keys() == kept.keys()
    assert all(torch.equal(own[key], kept[key]) for key in own)
    assert [set(vars(m)) for m in module.modules()] == before  # and nothing is left behind
    again, _ = runs.live(pairs, ())
    (slope,) = torch.autograd.grad(
        again.sum(), [runs.live(pairs, ("z",))[1]["z", 0]], allow_unused=True
    )
    assert slope is None


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma3"])
def test_relevance_is_conserved_from_layer_to_layer(name: str) -> None:
    """Without biases Σ x · ρ(x) over a stream is the metric, at every layer."""
    runs = runs_of(name)
    for parameter, value in runs.model.module.named_parameters():
        assert "bias" not in parameter or not value.abs().any()
    (pairs,) = runs.batches(gradients=True)
    with ruled(runs.model, RELEVANCE):
        margins_, kept, slopes = runs.gradients(pairs, ("pre", "mid", "post"))
    for key, wire in kept.items():
        found = (wire.double() * slopes[key].double()).sum((1, 2))
        torch.testing.assert_close(found, margins_.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_norms_activations_and_gates_are_found(name: str) -> None:
    check_rules(runs_of(name))


def test_transformer_lens_models_are_understood() -> None:
    check_rules(lens_bench())
    found = RelP(edges=True).find(lens_bench())
    np.testing.assert_allclose(*_sums(found), rtol=1e-3)


def _sums(found: Any) -> tuple[Any, Any]:
    table = found.edges[found.edges.sender.str.contains("H")]
    heads = table.groupby("sender", sort=False)["score"].sum()
    return [heads[str(Head(i // 4, i % 4))] for i in range(len(found.effect))], found.effect


@pytest.mark.parametrize("part", ["activation", "norm", "router"])
def test_a_model_with_a_part_of_an_unknown_kind_is_refused(part: str) -> None:
    if part == "router":
        model = tiny.build("gpt_oss")
    else:
        model = tiny.build("llama")
        odd = {
            "activation": lambda module, args, out: torch.exp(-out.square()),
            "norm": lambda module, args, out: out / out.abs().amax(-1, keepdim=True),
        }[part]
        model.model.layers[1].mlp.down_proj.register_forward_hook(odd)
    runs = PairedRuns(hook(model, name="odd"), Prompts(Written(), instances(2)))
    for method in (RelP(), GIM()):
        with pytest.raises(TapError, match="backward rules don't reach all of odd"):
            method.find(runs)


def test_where_rounding_hides_what_was_missed_a_wider_type_is_asked_for() -> None:
    model = tiny.build("llama").to(torch.bfloat16)
    runs = PairedRuns(hook(model, name="half"), Prompts(Written(), instances(2)))
    with pytest.raises(TapError, match="dtype='float32'"):
        RelP().find(runs)
    wide = PairedRuns(hook(tiny.build("llama").double(), name="wide"), runs.prompts)
    np.testing.assert_allclose(
        RelP().find(wide).effects, RelP().find(bench_of("llama", 2)).effects, rtol=1e-3, atol=1e-4
    )


def linear_twin(name: str, rows: Any) -> Any:
    """A float64 twin whose norms, activations, gates and patterns are what they are on clean
    prompts, so that it is linear."""
    twin = exact(tiny.build(name))
    patterns, _ = tiny.attentions(tiny.eager(tiny.build(name)).double(), **inputs(rows))
    seen: dict[Any, torch.Tensor] = {}

    def note(module: Any, args: tuple, out: torch.Tensor) -> None:
        seen[module] = args[0]

    watched = [m for m in twin.modules() if isinstance(m, RMS)]
    watched += [m for b in twin.model.layers for m in (b.mlp.act_fn, b.mlp.gate_proj)]
    handles = [m.register_forward_hook(note) for m in watched]
    with torch.no_grad():
        twin(**inputs(rows), use_cache=False)
    for handle in handles:
        handle.remove()
    for norm in [m for m in twin.modules() if isinstance(m, RMS)]:
        scale = norm.weight / (seen[norm].square().mean(-1, keepdim=True) + norm.eps).sqrt()
        norm.forward = lambda x, scale=scale: x * scale
    for block, pattern in zip(twin.model.layers, patterns, strict=True):
        mlp, attention, x0 = block.mlp, block.self_attn, seen[block.mlp.gate_proj]
        g0 = mlp.gate_proj(x0)
        ratio, a0, u0 = (mlp.act_fn(g0) / g0), mlp.act_fn(g0), mlp.up_proj(x0)

        def gated(x: Any, mlp: Any = mlp, r: Any = ratio, a0: Any = a0, u0: Any = u0) -> Any:
            return mlp.down_proj((mlp.gate_proj(x) * r * u0 + a0 * mlp.up_proj(x)) / 2)

        def attend(
            hidden_states: Any, own: Any = attention, pattern: Any = pattern, **rest: Any
        ) -> Any:
            v = own.v_proj(hidden_states).unflatten(-1, (2, 8)).repeat_interleave(2, 2)
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
            return own.o_proj(z.flatten(2)), None

        mlp.forward, attention.forward = gated, attend
    return twin


def test_relp_is_exact_where_the_model_is_linear() -> None:
    """With norms, activations, gates and patterns as they are, replacing a head does what RelP
    says, prompt by prompt."""
    rows = instances(3)[::2]  # of one length
    runs = PairedRuns(hooked("llama"), Prompts(Written(), rows))
    twin = linear_twin("llama", rows)
    stand, _ = values("llama", rows)
    given = inputs(rows)
    with torch.no_grad():
        clean = margins(twin(**given, use_cache=False).logits, rows)
        np.testing.assert_allclose(clean, runs.margins(), rtol=1e-4)
        wanted = []
        for head in (Head(layer, h) for layer in range(2) for h in range(4)):

            def change(z: torch.Tensor, head: Head = head) -> torch.Tensor:
                z = z.clone()
                z[:, :, head.head] = stand[head.layer][:, :, head.head]
                return z

            with tiny.rewriting_z(twin, head.layer, change):
                wanted.append(clean - margins(twin(**given, use_cache=False).logits, rows))
    found = RelP(attention="frozen").find(runs)
    size = np.abs(wanted).max()
    np.testing.assert_allclose(found.effects, wanted, rtol=1e-3, atol=1e-4 * size)
    plain = Attribution().find(runs)
    assert np.abs(plain.effects - found.effects).max() > 0.05 * size  # it is not attribution


def test_no_rules_is_attribution() -> None:
    runs = bench_of("gpt2", 2)
    found = first_order(runs, "resample", "", Rules(norms=False))
    np.testing.assert_allclose(found, first_order(runs, "resample", ""), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_softmax_takes_its_gradient_at_the_temperature(name: str) -> None:
    """∂/∂q, ∂/∂k, ∂/∂v of attention alone, by the formulas, in float64."""
    runs, layer = runs_of(name, 1), 1
    (pairs,) = runs.batches(gradients=True)
    with ruled(runs.model, Rules(norms=False, logits=0.25, values=0.5, temperature=2.0)):
        margins_, kept = runs.live(pairs, ("q", "k", "v", "z"))
        wires = [kept[place, layer] for place in "zqkv"]
        found = torch.autograd.grad(margins_.sum(), wires)

    slope, q, k, v = (t.detach().double() for t in (found[0], *wires[1:]))
    config = getattr(runs.model.module, "config", None)
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2).requires_grad_() for t in (k, v))
    q = q.requires_grad_()
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    cap = getattr(config, "attn_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    window = None if name == "llama" else tiny.window_of(config, layer)
    logits = logits.masked_fill(~tiny.visible(pairs.mask, window), -torch.inf)
    if name == "gpt_oss":
        sink = runs.model.module.model.layers[layer].self_attn.sinks.detach().double()
        logits = torch.cat([logits, sink[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    n = pairs.mask.shape[1]
    warm, own = (logits.detach() / 2).softmax(-1)[..., :n], logits.detach().softmax(-1)[..., :n]
    into = torch.einsum("bqhd,bkhd->bhqk", slope, v.detach())
    back = warm * (into - (warm * into).sum(-1, keepdim=True)) / 4
    wanted = list(torch.autograd.grad(logits[..., :n], [q, k], back))
    wanted.append(torch.einsum("bhqk,bqhd->bkhd", own, slope))
    groups = kept["k", layer].shape[2]
    for place, (one, other) in zip("qkv", zip(found[1:], wanted, strict=True), strict=True):
        if place != "q":
            other = other.unflatten(2, (groups, -1)).sum(3)
        size = float(other.abs().max())
        # values take half on their way on, behind the wire that is kept in these models
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize(
    "method",
    [RelP(), RelP(attention="frozen"), GIM(), GIM(gates=True)],
    ids=["relp", "frozen", "gim", "gates"],
)
def test_both_libraries_agree(method: Any) -> None:
    """TransformerLens patterns are softened from themselves, HuggingFace ones from q and k."""
    pytest.importorskip("transformer_lens")
    lens = hook(hooked_transformer(tiny.build("llama")), name="lens")
    rows = Prompts(Written(), instances(1))
    one, other = (method.find(PairedRuns(model, rows)).effect for model in (lens, hooked("llama")))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_values_pass_on_half() -> None:
    runs = bench_of("llama", 1)
    (pairs,) = runs.batches(gradients=True)
    gradients = []
    for share in (1.0, 0.5):
        with ruled(runs.model, Rules(norms=False, logits=0.0, values=share)):
            margins_, kept = runs.live(pairs, ("pre", "post"))
            alone = (margins_.sum(), kept["pre", 1], kept["post", 1])
            gradients.append(torch.autograd.grad(alone[0], alone[1]))
    # the rest of the gradient, through the stream and the MLP, is not the values'
    assert not torch.allclose(gradients[0][0], gradients[1][0])


def test_softening_a_pattern_needs_its_logits_no_more() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 3:] = -torch.inf
    found = softened(logits.softmax(-1), 2.0)
    torch.testing.assert_close(found, 2 * (logits / 2).softmax(-1))
    blind = softened(torch.zeros(1, 4, requires_grad=True), 2.0)
    assert bool(torch.isfinite(blind).all())


@pytest.mark.parametrize("method", [RelP(edges=True), GIM(edges=True)], ids=["relp", "gim"])
def test_edges_add_up_to_the_head(method: Any) -> None:
    found, wanted = _sums(method.find(bench_of("llama", 2)))
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-4)


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: RelP("median"),
        lambda: RelP(attention="patched"),
        lambda: RelP(edges="yes"),  # type: ignore[arg-type]
        lambda: GIM(temperature=0.0),
        lambda: GIM(gates=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError):
            make()
    assert GIM.make("code").rules.products and not GIM.make("paper").rules.products
    assert RelP.make("frozen").attention == "frozen" and hooked("llama").n_layers == 2
