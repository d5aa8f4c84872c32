"""Discrete-SAE circuits: codes and scores by brute force, the loss by definition, export, and
circuits whose truth is known."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.circuits import evaluate, find, planted
from interp.circuits.methods import codes
from interp.circuits.methods.attribution_by_code import AttributionByCode
from interp.circuits.methods.coding import Codes, gather
from interp.circuits.methods.discrete_sae import DiscreteSAE
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import from_task
from interp.errors import InputError, ModelError
from interp_hooks import Head

pytestmark = pytest.mark.slow  # autoencoders are trained

QUICK = dict(trials=3, steps=100)


# --- scores from codes
# ------------------------------------------------------------------------------------------------


@st.composite
def both_sides(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    n, m, heads = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(2, 5))
    size = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return rng.integers(-1, size, (n, heads)), rng.integers(-1, size, (m, heads))


@given(both_sides())
@settings(max_examples=60, deadline=None)
def test_node_and_pair_counts_are_sets_counted(sides: tuple[np.ndarray, np.ndarray]) -> None:
    positive, negative = sides
    heads = positive.shape[1]
    wanted = [len(set(positive[:, h]) - set(negative[:, h])) for h in range(heads)]
    assert codes.node_score(positive, negative).tolist() == wanted
    counts = codes.edge_matrix(positive, negative)
    for i in range(heads):
        for j in range(heads):
            seen = {(a, b) for a, b in zip(positive[:, i], positive[:, j], strict=True)}
            other = {(a, b) for a, b in zip(negative[:, i], negative[:, j], strict=True)}
            assert counts[i, j] == (len(seen - other) if j > i else 0)


def test_edge_score_counts_ends_of_the_strongest_pairs() -> None:
    counts = np.zeros((4, 4))
    counts[0, 1], counts[0, 3], counts[1, 2], counts[2, 3] = 9, 8, 7, 6
    # 4² / 2 = 8 ends: four pairs
    assert codes.edge_score(counts).tolist() == [2, 2, 2, 2]
    # each pair twice in the list: two pairs, whose ends count twice
    assert codes.edge_score(counts, twice=True).tolist() == [4, 2, 0, 2]
    counts[2, 3], counts[1, 3] = 0, 6
    assert codes.edge_score(counts).tolist() == [2, 3, 1, 2]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_effect_score_is_its_formula(n: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    of, effects = rng.integers(0, size, (n, 3)), rng.normal(size=(n, 3))
    for h in range(3):
        total = sum(
            (of[:, h] == c).mean() * abs(effects[of[:, h] == c, h].mean())
            for c in range(size)
            if (of[:, h] == c).any()
        )
        assert codes.effect_score(of, effects)[h] == pytest.approx(total)
    same, own = np.zeros((n, 3), int), np.arange(n)[:, None].repeat(3, 1)
    np.testing.assert_allclose(codes.effect_score(same, effects), np.abs(effects.mean(0)))
    np.testing.assert_allclose(codes.effect_score(own, effects), np.abs(effects).mean(0))


def test_pairs_never_take_heads_squared_times_codes_squared() -> None:
    """144 heads and 200 codes: the published co-occurrence tensor has 829 million cells."""
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 200, (60, 144)), rng.integers(0, 200, (60, 144))
    tracemalloc.start()
    codes.edge_matrix(positive, negative)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 829e6 / 10


def test_the_loss_is_the_paper_s_and_not_saelens_s() -> None:
    from sae_lens import StandardTrainingSAE
    from sae_lens.saes.sae import TrainStepInput

    from interp.circuits.methods.sae import _new

    torch.manual_seed(0)
    x, made = torch.randn(20, 12), _new(12, 7, 0.3, 1, None)
    made.normalise()
    step = made.training_forward_pass(TrainStepInput(x, {"l1": 0.3}, None, 0, False))
    W_e, W_d, b, b_e = (
        p.detach().double() for p in (made.W_enc, made.W_dec, made.b_dec, made.b_enc)
    )
    f = ((x.double() - b) @ W_e + b_e).clamp_min(0)
    error, sparsity = ((f @ W_d + b - x.double()) ** 2).mean(), f.sum(1).mean()
    assert float(step.loss.detach()) == pytest.approx(float(error + 0.3 * sparsity), rel=1e-5)
    theirs = StandardTrainingSAE.training_forward_pass(
        made, TrainStepInput(x, {"l1": 0.3}, None, 0, False)
    )
    assert float(theirs.losses["mse_loss"].detach()) == pytest.approx(12 * float(error), rel=1e-5)


def test_training_keeps_features_at_norm_one_and_projects_gradients() -> None:
    from sae_lens.saes.sae import TrainStepInput

    from interp.circuits.methods.sae import _new, train

    x = torch.randn(30, 10, generator=torch.Generator().manual_seed(3))
    made, loss = train(x, 16, 0.02, 60, 1e-2, seed=0)
    assert torch.allclose(made.W_enc.norm(dim=0), torch.ones(16), atol=1e-5)
    assert torch.allclose(made.W_dec.norm(dim=1), torch.ones(16), atol=1e-5)
    again, _ = train(x, 16, 0.02, 60, 1e-2, seed=0)
    assert torch.equal(made.W_enc, again.W_enc)
    first = train(x, 16, 0.02, 1, 1e-2, seed=0)[1]
    assert loss < 0.7 * first
    fresh = _new(10, 16, 0.02, 0, None)
    fresh.normalise()
    fresh.training_forward_pass(TrainStepInput(x, {"l1": 0.02}, None, 0, False)).loss.backward()
    fresh.project_gradients()
    assert fresh.W_enc.grad is not None and fresh.W_dec.grad is not None
    assert float((fresh.W_enc.grad * fresh.W_enc.detach()).sum(0).abs().max()) < 1e-6
    assert float((fresh.W_dec.grad * fresh.W_dec.detach()).sum(1).abs().max()) < 1e-6


def test_subspace_and_scale_are_folded_into_the_weights() -> None:
    """Samples in a 4-dimensional subspace: the autoencoder of the whole space must do on them, in
    their own units, what the one that was trained inside does."""
    from interp.circuits.methods.sae import train

    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, generator=g) @ torch.randn(4, 24, generator=g) * 30 + 5
    made, _ = train(x, 40, 0.01, 1500, 5e-3, seed=0, variance=0.99999, standardise=True)
    assert made.W_enc.shape == (24, 40)
    error = (made.decode(made.encode(x)) - x).pow(2).mean() / x.var()
    assert float(error.detach()) < 0.02
    # nothing outside the samples' own span
    _, _, rows = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    outside = made.W_dec @ rows[4:].T
    assert float(outside.norm() / made.W_dec.norm()) < 1e-3
    with pytest.raises(InputError, match="zero"):
        train(torch.zeros(5, 4), 3, 0.1, 2, 1e-3, 0, standardise=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_pooled_outputs_add_up_to_the_layer_s_output(worded: Any, name: str) -> None:
    """Σ_h result_h + b_O is the attention module's output, averaged over real positions, or at the
    last one."""
    import tiny

    model, _ = worded(name)
    prompts = from_task(model, "ioi", 5)
    runs = PairedRuns(model, prompts)
    for pool in ("mean", "last"):
        outputs = gather(runs, pool, attribute=False)
        for layer, module in enumerate(tiny.layers(model.module)):
            kept: list[torch.Tensor] = []
            handle = module.register_forward_hook(
                lambda m, a, out, kept=kept: kept.append(out[0].detach())
            )
            with torch.no_grad():
                for instance in prompts.instances:
                    model.module(input_ids=torch.tensor([instance.ids]), use_cache=False)
            handle.remove()
            rows = [k.reshape(-1, k.shape[-1]) for k in kept]
            wanted = torch.stack([r.mean(0) if pool == "mean" else r[-1] for r in rows])
            found = torch.einsum("nhd,hdm->nm", outputs.clean[layer], outputs.W_O[layer])
            bias = model.head_weights(layer).b_O
            torch.testing.assert_close(
                found + (0 if bias is None else bias), wanted, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", planted.names())
def test_planted_circuits_are_found_by_effects_and_as_well_with_the_codes_shuffled(
    name: str,
) -> None:
    made = planted.get(name)
    for shuffled in (False, True):
        circuit = find(
            made.model, made.task, "attribution_by_code", n=48, shuffled=shuffled, **QUICK
        )
        assert evaluate(circuit, made.truth).auc >= 0.95
    row = circuit.frame
    effect = row.attribution_by_code_effect
    assert (row.attribution_by_code_effect_low <= effect).all()
    assert (effect <= row.attribution_by_code_effect_high).all()


def test_shuffled_codes_are_as_often_seen_and_elsewhere() -> None:
    """What is left of them is how often each is seen, head by head."""
    rng = np.random.default_rng(0)
    positive, attributed = rng.integers(0, 4, (40, 5)), rng.normal(size=(40, 5))
    made = Codes(positive, positive, np.zeros((5, 5)))
    own = AttributionByCode().score_of(made, attributed, 0)
    np.testing.assert_allclose(own, codes.effect_score(positive, attributed))
    twin = AttributionByCode(shuffled=True)
    other = twin.score_of(made, attributed, 0)
    assert not np.allclose(own, other)
    assert np.array_equal(other, twin.score_of(made, attributed, 0))
    alone = twin.score_of(Codes(positive * 0, positive, made.pairs), attributed, 0)
    np.testing.assert_allclose(alone, np.abs(attributed.mean(0)))  # one code: nothing to shuffle


def test_the_paper_s_score_finds_the_planted_ioi_circuit() -> None:
    """Stages that differ between both kinds of prompts, which is what counting codes can see."""
    made = planted.get("ioi")
    circuit = find(made.model, made.task, "discrete_sae", n=100, preset="paper", trials=3)
    assert evaluate(circuit, made.truth).auc >= 0.9
    assert circuit.search.forwards == 2 and circuit.search.backwards == 0
    thirds = 3 * circuit.frame.discrete_sae  # counts, averaged over three trials
    np.testing.assert_allclose(thirds, thirds.round(), atol=1e-9)
    assert circuit.frame.discrete_sae.max() > 1


def test_the_paper_s_score_takes_two_forwards_and_effects_a_backward_more(pocket: Any) -> None:
    """The corrupted run gives both what is pooled and what z is compared with."""
    search = find(pocket, "ioi", "discrete_sae", n=12, trials=1, steps=5).search
    assert (search.forwards, search.backwards) == (2.0, 0.0)
    search = find(pocket, "ioi", "attribution_by_code", n=12, trials=1, steps=5).search
    assert (search.forwards, search.backwards) == (2.0, 1.0)


def test_the_same_seed_gives_the_same_circuit(pocket: Any) -> None:
    one, other = (find(pocket, "ioi", "discrete_sae", n=16, seed=2, **QUICK) for _ in range(2))
    assert one.frame.equals(other.frame) and one.edges.equals(other.edges)
    third = find(pocket, "ioi", "discrete_sae", n=16, seed=3, **QUICK)
    assert not one.frame.equals(third.frame)


LOAD = """
import json, sys
import torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
assert not any(m == "interp" or m.startswith("interp") for m in sys.modules), "interp was imported"
x = torch.linspace(-1, 1, 3 * sae.cfg.d_in).reshape(3, -1)
print(json.dumps(dict(
    kind=type(sae).__name__, architecture=sae.cfg.architecture(), features=sae.encode(x).tolist(),
    back=sae(x).tolist(), heads=sae.cfg.metadata.heads,
    layers=sae.cfg.metadata.layers, pool=sae.cfg.metadata.pool,
)))
"""


def test_the_autoencoder_loads_where_interp_was_never_imported(pocket: Any, tmp_path: Path) -> None:
    circuit = find(pocket, "ioi", "discrete_sae", n=16, **QUICK)
    circuit.save(tmp_path / "out")
    folder = tmp_path / "out" / "sae"
    run = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["kind"] == "StandardSAE" and said["architecture"] == "standard"
    assert (
        said["heads"] == [f"L{layer}H{h}" for layer in range(4) for h in range(8)]
        and said["pool"] == "mean"
    )
    assert said["layers"] == [0, 1, 2, 3]
    sae = circuit.artefacts["sae"].sae
    x = torch.linspace(-1, 1, 3 * sae.cfg.d_in).reshape(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(said["features"]), sae.encode(x), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(torch.tensor(said["back"]), sae(x), rtol=1e-4, atol=1e-6)
    # and it can be used again, from its folder
    again = find(pocket, "ioi", "attribution_by_code", n=16, sae=folder)
    runs = PairedRuns(pocket, from_task(pocket, "ioi", 16))
    outputs = gather(runs, "mean", attribute=True)
    made = AttributionByCode(sae=folder)._codes(runs, outputs, [sae])
    assert outputs.attributed is not None
    np.testing.assert_allclose(
        again.frame.attribution_by_code,
        codes.effect_score(made.positive, outputs.attributed),
        rtol=1e-4,
    )


def hook_z_sae(layer: int, heads: int, d_head: int, features: int = 24) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=f"blocks.{layer}.attn.hook_z")
    made = StandardSAE(
        StandardSAEConfig(
            d_in=heads * d_head, d_sae=features, metadata=metadata, reshape_activations="hook_z"
        )
    )
    g = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(made.W_enc.shape, generator=g))
        made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=g))
    return made


def test_an_existing_autoencoder_on_hook_z_serves_its_layer(pocket: Any) -> None:
    given = hook_z_sae(1, 8, 32)
    circuit = find(pocket, "ioi", "discrete_sae", n=12, score="node", sae=given)
    assert (circuit.frame.discrete_sae[circuit.frame.layer != 1] == 0).all()
    assert any("24 heads (layers 0, 2, 3)" in note for note in circuit.notes)
    runs = PairedRuns(pocket, from_task(pocket, "ioi", 12))
    outputs = gather(runs, "mean", attribute=False)
    z = outputs.clean[1]
    with torch.no_grad():
        features = torch.relu(
            (z.reshape(12, -1) - given.b_dec) @ given.W_enc + given.b_enc
        )  # (n, d_sae)
    for h in range(8):
        weight = given.W_dec[:, 32 * h : 32 * (h + 1)].norm(dim=1)
        wanted = (features * weight).argmax(1)
        positive = DiscreteSAE(sae=given)._codes(runs, outputs, [given]).positive
        assert positive[:, 8 + h].tolist() == wanted.tolist()
    both = find(
        pocket,
        "ioi",
        "discrete_sae",
        n=12,
        score="node",
        sae=[hook_z_sae(k, 8, 32) for k in range(4)],
    )
    assert not any("no code" in note for note in both.notes)


def test_the_default_is_the_paper_s() -> None:
    assert DiscreteSAE() == DiscreteSAE.make("paper") == DiscreteSAE(score="node")
    paper = (DiscreteSAE().sparsity, DiscreteSAE().steps, DiscreteSAE().rate)
    assert paper == (0.02, 500, 1e-3) and not DiscreteSAE().standardise
    assert DiscreteSAE(score="edge") == DiscreteSAE.make("paper-edge")
    assert DiscreteSAE.make("code").pairs == "twice"
    assert DiscreteSAE.make("paper-docstring").sparsity == 0.05
    assert AttributionByCode().steps == 200 and AttributionByCode().standardise


def test_options_of_what_a_head_s_output_is(pocket: Any) -> None:
    for options in (
        dict(pool="last"),
        dict(vector="z"),
        dict(score="edge"),
        dict(variance=0.9, standardise=True),
    ):
        circuit = find(pocket, "ioi", "discrete_sae", n=12, trials=2, steps=40, **options)
        assert (
            np.isfinite(circuit.frame.discrete_sae).all() and circuit.frame.discrete_sae.max() > 0
        )
    last = find(pocket, "ioi", "discrete_sae", n=12, trials=2, steps=40, pool="last", score="node")
    assert (
        last.value(Head(2, 0), "discrete_sae") > 0
    )  # a mover, whose output at the end is another name


def test_edges_are_pairs_of_codes_of_earlier_and_later_heads(pocket: Any) -> None:
    edges = find(pocket, "ioi", "discrete_sae", n=16, **QUICK).edges
    assert list(edges.columns) == ["sender", "receiver", "kind", "score"] and len(edges) > 10
    for sender, receiver in zip(edges.sender, edges.receiver, strict=True):
        assert Head.parse(sender).layer < Head.parse(receiver).layer
    assert (np.diff(edges.score) <= 0).all() and (edges.score > 0).all()


def test_settings_that_make_no_sense(pocket: Any, tmp_path: Path) -> None:
    for wrong in (
        dict(score="best"),
        dict(pool="max"),
        dict(vector="q"),
        dict(features=0),
        dict(trials=0),
        dict(variance=0.0),
        dict(sparsity=-1.0),
        dict(rate=0.0),
    ):
        with pytest.raises(InputError, match="discrete_sae"):
            DiscreteSAE(**wrong)
    with pytest.raises(InputError, match="no preset"):
        find(pocket, "ioi", "discrete_sae", n=4, preset="papper")
    with pytest.raises(InputError, match="featurs is not a setting"):
        find(pocket, "ioi", "discrete_sae", n=4, featurs=3)
    with pytest.raises(ModelError, match="no SAELens autoencoder"):
        find(pocket, "ioi", "discrete_sae", n=4, sae=tmp_path / "nothing")
    with pytest.raises(InputError, match="not a SAELens autoencoder"):
        find(pocket, "ioi", "discrete_sae", n=4, sae=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="takes vectors of 32 numbers"):
        find(pocket, "ioi", "discrete_sae", n=4, sae=hook_z_sae(0, 1, 32))
