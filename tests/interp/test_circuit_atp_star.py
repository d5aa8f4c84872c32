"""AtP*: its softmax is exact where what follows is linear, its drops are those of a model with
branches cut by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from split_stream import exact
from test_circuit_gradients import bench_of, inputs, instances, lens_bench, values

from interp.circuits.methods.atp_star import AtPStar
from interp.circuits.methods.attribution import Attribution
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written
from interp.errors import InputError, TapError
from interp_hooks import HookedModel, hook


def one_layer() -> HookedModel:
    """One attention, keys not shared, and nothing after it but the unembedding: m is linear in
    z."""
    model = tiny.build("llama", num_hidden_layers=1, num_key_value_heads=4)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.q_proj.weight.mul_(6.0)  # near saturation
    model.model.norm = torch.nn.Identity()
    return hook(model, name="one")


def patched(runs: PairedRuns, place: str, head: int) -> np.ndarray:
    """(n,) margins with one head's queries, keys or values from the corrupted twin."""
    found = []
    for pairs in runs.batches():
        _, other = runs.run(pairs, corrupted=True, keep=(place,))

        def write(
            at: str, layer: int, wire: torch.Tensor, other: Any = other
        ) -> torch.Tensor | None:
            if at != place:
                return None
            new = wire.clone()
            new[:, :, head] = other[place, layer][:, :, head]
            return new

        found.append(runs.run(pairs, write=write)[0].double().numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("place", ["q", "k", "v", "z"])
def test_the_softmax_is_exact(place: str) -> None:
    """Where nothing nonlinear follows attention, a node's effect is that of patching it."""
    runs = PairedRuns(one_layer(), Prompts(Written(), instances(3)))
    clean = runs.margins()
    wanted = np.array([np.abs(clean - patched(runs, place, h)).mean() for h in range(4)])
    found = AtPStar(nodes=(place,)).find(runs)
    assert wanted.max() > 0.1
    np.testing.assert_allclose(found.score, wanted, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_queries_is_not() -> None:
    """What the fix is for: to first order in q the same patches are misjudged."""
    runs = PairedRuns(one_layer(), Prompts(Written(), instances(3)))
    clean = runs.margins()
    (pairs,) = runs.batches(gradients=True)
    _, other = runs.run(pairs, corrupted=True, keep=("q",))
    _, kept, slopes = runs.gradients(pairs, ("q",))
    linear = ((kept["q", 0] - other["q", 0]) * slopes["q", 0]).sum((1, 3)).abs().mean(0).numpy()
    wanted = np.array([np.abs(clean - patched(runs, "q", h)).mean() for h in range(4)])
    assert np.abs(linear - wanted).max() > 0.2 * wanted.max()


def by_hand(name: str) -> np.ndarray:
    """(heads, n): mean over the layers of |Σ (z − z') · ∂m/∂z|, ∂m without the layer's branches,
    from an untapped twin whose branches are detached."""
    rows, twin = instances(2), exact(tiny.build(name))
    (stand, _), given, total = values(name, rows), inputs(rows), 0
    for dropped in range(2):
        block, seen = twin.model.layers[dropped], {}

        def cut(module: Any, args: Any, out: Any) -> Any:
            return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

        handles = [m.register_forward_hook(cut) for m in (block.self_attn, block.mlp)]
        for layer, attention in enumerate(tiny.layers(twin)):

            def note(module: Any, args: tuple, layer: int = layer, seen: Any = seen) -> tuple:
                seen[layer] = args[0]
                return args

            handles.append(tiny.output_module(attention).register_forward_pre_hook(note))
        logits = twin(**given, use_cache=False).logits
        m = sum(
            row[-1, i.accept[0][0]] - row[-1, list(i.wrong[0])].mean()
            for row, i in zip(logits, rows, strict=True)
        )
        slopes = torch.autograd.grad(m, [seen[0], seen[1]], allow_unused=True)
        for handle in handles:
            handle.remove()
        parts = []
        for layer, slope in enumerate(slopes):
            z = seen[layer].detach().unflatten(-1, (4, 8))
            g = torch.zeros_like(z) if slope is None else slope.unflatten(-1, (4, 8))
            parts.append(((z - stand[layer]) * g).sum((1, 3)).T.abs())
        total = total + torch.cat(parts).numpy()
    return total  # two layers: divided by L − 1 = 1


def test_drops_are_those_of_branches_cut_by_hand() -> None:
    runs = bench_of("llama", 2)
    found = AtPStar(nodes=("z",)).find(runs)
    wanted = by_hand("llama").mean(1)
    np.testing.assert_allclose(found.score, wanted, rtol=1e-3, atol=1e-5)
    assert (runs.forwards, runs.backwards) == (2 + 1.0, 3.0)  # two drops and the plain one


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_effect_is_attributions(name: str) -> None:
    runs = bench_of(name, 2)
    found, plain = AtPStar(drop=False).find(runs), Attribution().find(runs)
    np.testing.assert_allclose(found.effects, plain.effects, rtol=1e-3, atol=1e-4)
    only = AtPStar(nodes=("z",), drop=False).find(runs)
    np.testing.assert_allclose(only.score, np.abs(plain.effects).mean(1), rtol=1e-3, atol=1e-4)
    assert (found.score >= only.score - 1e-7).all() and "nodes that decide" in found.notes[0]


def test_what_it_needs_is_asked_for() -> None:
    with pytest.raises(TapError, match="load the HuggingFace model"):
        AtPStar().find(lens_bench())
    for make in (
        lambda: AtPStar(nodes=()),
        lambda: AtPStar(nodes=("o",)),
        lambda: AtPStar(drop=1),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError):
            make()
    assert AtPStar(nodes="q, k").nodes == ("q", "k")  # type: ignore[arg-type]
