"""Edges where heads write through a norm (Gemma 2 and 3, OLMo 2) or times a number (Granite):
against the model's own stream, finite differences, and attribution with the norm's scale held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from split_stream import RMS, Split, edge_label, exact
from test_circuit_gradients import STEP, bench_of, hooked, inputs, instances, margins, scores

from interp.circuits.methods.attribution import Attribution
from interp.circuits.methods.eap import EAP
from interp.circuits.methods.eap_ig import EAPIG
from interp.circuits.runs.edges import STREAM, Stream
from interp.circuits.runs.subgraph import Receivers, Subgraph
from interp.circuits.runs.writers import Writer, factor_of
from interp_hooks.errors import TapError

NORMED = ["gemma2", "gemma3", "olmo2"]


@pytest.mark.parametrize("name", [*NORMED, "granite"])
def test_what_heads_write_adds_up_to_what_the_layer_adds(name: str) -> None:
    runs = bench_of(name)
    stream = Stream(runs)
    (pairs,) = runs.batches(gradients=True)
    _, kept = runs.run(pairs, keep=STREAM)
    real = pairs.mask.bool()
    assert not any("bias" in name for name, _ in runs.model.module.named_parameters())
    for layer, writer in stream.writers.items():
        z = kept["z", layer]
        scale = writer.scale(z)
        parts = writer.result(z, scale).sum(2)
        written = kept["mid", layer] - kept["pre", layer]
        torch.testing.assert_close(parts[real], written[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(writer.written(z)[real], written[real], rtol=1e-4, atol=1e-5)
    assert not stream.plain


def test_factors_are_told_and_ones_stay_ones() -> None:
    total = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert factor_of(0.22 * total, total) == pytest.approx(0.22, rel=1e-6)
    assert factor_of(total * (1 + 1e-6), total) == 1.0
    granite = Stream(bench_of("granite")).writers
    assert all(
        w.factor == pytest.approx(0.3, rel=1e-5) and w.norm is None for w in granite.values()
    )


def precise(name: str) -> Any:
    """An untapped copy in float64, Gemma's norms too."""
    twin = exact(tiny.build(name))
    for module in list(twin.modules()):
        for key, child in module.named_children():
            if type(child).__name__.startswith("Gemma3RMSNorm"):
                setattr(module, key, RMS(1 + child.weight, child.eps))
    return twin


def split_of(name: str) -> Split:
    """The reference whose senders write through the branch's norm as it is in the clean run."""
    twin = precise(name)
    split = Split(name, twin)
    if name == "granite":
        split.written = lambda sender, output: output * twin.config.residual_multiplier
        return split
    held: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Any:
        def hook(module: RMS, args: tuple) -> None:
            held[layer] = (
                module.weight / (args[0].square().mean(-1, keepdim=True) + module.eps).sqrt()
            )

        return hook

    handles = []
    for layer, block in enumerate(twin.model.layers):
        split.named[layer]["ln_mlp"] = block.pre_feedforward_layernorm
        split.named[layer]["mlp"] = block.post_feedforward_layernorm
        handles.append(block.post_attention_layernorm.register_forward_pre_hook(note(layer)))
    with torch.no_grad():
        twin(**inputs(instances()), use_cache=False)
    for handle in handles:
        handle.remove()
    split.written = lambda sender, out: out if sender[0] == "mlp" else out * held[sender[0]]
    return split


@pytest.mark.parametrize("name", ["gemma3", "granite"])
def test_eap_is_the_derivative_along_each_edge(name: str) -> None:
    """d/dα m(input of v := stream + α (u(x') − u(x))) at α = 0, u with the scale held."""
    rows, split = instances(), split_of(name)
    _, own = split.run(inputs(rows))
    _, other = split.run(inputs(rows, "corrupted"))
    draw, wanted = np.random.default_rng(0), {}
    for edge in (split.edges[i] for i in draw.choice(len(split.edges), 12, replace=False)):
        up, down = (
            margins(split.run(inputs(rows), other, {edge: sign * STEP})[0], rows).mean()
            for sign in (1.0, -1.0)
        )
        wanted[edge_label(name, edge)] = -(up - down) / (2 * STEP)
    found = scores(EAP().find(bench_of(name)))
    assert found.keys() == {edge_label(name, edge) for edge in split.edges}
    size = max(map(abs, wanted.values()))
    assert size > 1e-3 and own.keys() == other.keys()
    for edge, value in wanted.items():
        assert found[edge] == pytest.approx(value, rel=2e-3, abs=2e-4 * size), edge


@contextmanager
def scales_held(name: str) -> Iterator[None]:
    """The norms between heads and stream, in the graph with a constant scale, by hooks of the
    test's own."""

    def hook(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            ratio = torch.where(args[0] == 0, torch.zeros_like(output), output / args[0])
        return output.detach() + ratio * (args[0] - args[0].detach())

    handles = [
        block.post_attention_layernorm.register_forward_hook(hook)
        for block in hooked(name).module.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [*NORMED, "granite"])
def test_outgoing_edges_sum_to_attribution_with_the_branch_norm_held(name: str) -> None:
    """The norm's Jacobian at a constant scale is diagonal, output / input."""
    runs = bench_of(name)
    edges, free = EAP().find(runs), Attribution().find(runs)
    if name == "granite":
        held = free
    else:
        with scales_held(name):
            held = Attribution().find(runs)
            edges = EAP().find(runs)
        assert np.abs(held.effect - free.effect).max() > 0.01  # the norm's scale does matter
    size = np.abs(held.effect).max()
    np.testing.assert_allclose(edges.effect, held.effect, rtol=2e-3, atol=2e-4 * size)


def test_one_step_of_integrated_gradients_is_eap_there_too() -> None:
    runs = bench_of("gemma3")
    plain, integrated = scores(EAP().find(runs)), scores(EAPIG(steps=1).find(runs))
    assert plain.keys() == integrated.keys()
    for edge, value in plain.items():
        assert integrated[edge] == pytest.approx(value, rel=2e-3, abs=1e-4)


def cut(name: str) -> Subgraph:
    runs = bench_of(name, 2)
    stream = Stream(runs)
    (pairs,) = runs.batches()
    return Subgraph(stream, Receivers(runs, stream), pairs, "resample")


@pytest.mark.parametrize("name", [*NORMED, "granite"])
def test_patched_edges_take_the_norm_anew(name: str) -> None:
    """None removed is the clean run, all removed the corrupted one, also where layers are not run
    again."""
    sub, model = cut(name), tiny.eager(tiny.build(name))
    whole = torch.from_numpy(sub.graph.allowed).float()
    late = whole.clone()
    late[:, : sub.graph.columns[1].start] = 0
    found = sub.logits(torch.stack([torch.zeros_like(whole), whole, late]), 0)
    torch.testing.assert_close(sub.logits(late[None], 1)[0], found[2], rtol=1e-3, atol=1e-3)
    for one, which in zip(found, ("ids", "corrupted"), strict=False):
        with torch.no_grad():
            wanted = model(**inputs(instances(2), which), use_cache=False).logits[:, -1]
        torch.testing.assert_close(one[:, -1], wanted, rtol=2e-3, atol=2e-3)


def test_a_removed_edge_through_the_norm_is_that_head_replaced_in_it() -> None:
    """L0H1 and L0H2 → output alone: what an untapped model gives whose final stream has the norm of
    the branch with these two replaced."""
    sub, model = cut("gemma3"), tiny.eager(tiny.build("gemma3"))
    rows, block = instances(2), model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    handle = block.self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: seen.update(z=args[0])
    )
    with torch.no_grad():
        model(**inputs(rows, "corrupted"), use_cache=False)
        other = seen["z"]
        model(**inputs(rows), use_cache=False)
        handle.remove()
        mixed = seen["z"].clone()
        mixed[..., 8:24] = other[..., 8:24]
        norm, project = block.post_attention_layernorm, block.self_attn.o_proj
        change = norm(project(mixed)) - norm(project(seen["z"]))
        handle = model.model.norm.register_forward_pre_hook(lambda m, args: (args[0] + change,))
        wanted = model(**inputs(rows), use_cache=False).logits[:, -1]
        handle.remove()
    removed = torch.zeros(1, *sub.graph.allowed.shape)
    for head in ("L0H1", "L0H2"):
        removed[0, sub.graph.senders.index(head), -1] = 1
    for start in (0, 1):
        found = sub.logits(removed, start)[0][:, -1]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_no_sum_of_heads_is_refused() -> None:
    """A head's output that is squared on its way to the stream."""
    model = tiny.build("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_hook(lambda module, args, out: out + out**2)
    from interp_hooks import hook as tapped

    runs = bench_of("llama")
    with pytest.raises(TapError):
        runs.model = tapped(model, name="odd")
        Stream(runs)


def test_a_writer_without_norm_is_the_sum() -> None:
    weights = hooked("gpt2").head_weights(0)
    z = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    writer = Writer(weights)
    wanted = torch.einsum("bthd,hdm->btm", z, weights.W_O) + weights.b_O
    torch.testing.assert_close(writer.written(z), wanted)
    assert writer.scale(z) is None and writer.plain
