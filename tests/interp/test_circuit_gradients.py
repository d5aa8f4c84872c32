"""Attribution, EAP, EAP-IG and HISP against finite differences of an untapped model, and the
identities they obey."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from split_stream import Split, edge_label, exact

from interp.circuits.methods.attribution import Attribution
from interp.circuits.methods.circuit_method import Found
from interp.circuits.methods.eap import EAP
from interp.circuits.methods.eap_ig import EAPIG
from interp.circuits.methods.hisp import HISP
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, Written
from interp.errors import InputError
from interp.tasks.task import Instance
from interp_hooks import Head, HookedModel, hook

STEP = 1e-4


def instances(n: int = 3, seed: int = 0) -> tuple[Instance, ...]:
    """Random pairs of different lengths, one token right and two wrong."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        length = 5 + 2 * (i % 2)
        clean, corrupted = draw.integers(3, 101, (2, length)).tolist()
        corrupted[0] = clean[0]
        accept, *wrong = draw.choice(101, 3, replace=False).tolist()
        found.append(
            Instance(tuple(clean), (length - 1,), ((accept,),), (tuple(wrong),), tuple(corrupted))
        )
    return tuple(found)


@cache
def hooked(name: str) -> HookedModel:
    return hook(tiny.build(name), name=name)


@cache
def twin(name: str) -> Any:
    """The same, untapped, in float64."""
    return exact(tiny.build(name))


def bench_of(name: str, n: int = 3) -> PairedRuns:
    return PairedRuns(hooked(name), Prompts(Written(), instances(n)))


def inputs(rows: tuple[Instance, ...], which: str = "ids") -> dict[str, torch.Tensor]:
    """Left-padded rows for the twin."""
    width = max(len(i.ids) for i in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(getattr(i, which) for i in rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask, position_ids=tiny.positions(mask))


def margins(logits: torch.Tensor, rows: tuple[Instance, ...]) -> np.ndarray:
    """(n,) float64, by hand: the right logit minus the mean wrong one, at the end."""
    return np.array(
        [
            float(r[-1, i.accept[0][0]] - r[-1, list(i.wrong[0])].mean())
            for r, i in zip(logits, rows, strict=True)
        ]
    )


def scores(found: Found) -> dict[tuple[str, str, str], float]:
    assert found.edges is not None
    return {(s, r, k): v for s, r, k, v in found.edges.itertuples(index=False)}


# --- finite differences
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_eap_is_the_derivative_of_the_metric_along_each_edge(name: str) -> None:
    """d/dα m(input of v := stream + α (u(x') − u)) at α = 0, by central differences, is minus the
    edge's score."""
    rows = instances()
    split = Split(name, twin(name))
    clean, corrupted = inputs(rows), inputs(rows, "corrupted")
    _, other = split.run(corrupted)
    wanted = {}
    draw = np.random.default_rng(0)
    for edge in (split.edges[i] for i in draw.choice(len(split.edges), 30, replace=False)):
        up, down = (
            margins(split.run(clean, other, {edge: sign * STEP})[0], rows).mean()
            for sign in (1.0, -1.0)
        )
        wanted[edge_label(name, edge)] = -(up - down) / (2 * STEP)
    found = scores(EAP().find(bench_of(name)))
    assert found.keys() == {edge_label(name, edge) for edge in split.edges}
    size = max(map(abs, wanted.values()))
    assert size > 1e-3
    for edge, value in wanted.items():
        assert found[edge] == pytest.approx(value, rel=1e-3, abs=1e-4 * size), edge


def replaced(
    name: str, head: Head, rows: tuple[Instance, ...], stand: dict[int, torch.Tensor], by: float
) -> np.ndarray:
    """(n,) margins of the twin with z_h moved towards `stand` by a fraction."""

    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        given = stand[head.layer]
        z[:, :, head.head] += by * (given[..., head.head, :] - z[:, :, head.head])
        return z

    with torch.no_grad(), tiny.rewriting_z(twin(name), head.layer, change):
        return margins(twin(name)(**inputs(rows), use_cache=False).logits, rows)


def values(name: str, rows: tuple[Instance, ...]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """(layer → z (batch, tokens, heads, d) of the twin on the corrupted prompts, mask)."""
    seen: dict[int, torch.Tensor] = {}
    given = inputs(rows, "corrupted")
    for layer in range(2):

        def change(z: torch.Tensor, layer: int = layer) -> torch.Tensor:
            seen[layer] = z
            return z

        with torch.no_grad(), tiny.rewriting_z(twin(name), layer, change):
            twin(name)(**given, use_cache=False)
    return seen, given["attention_mask"].bool()


@cache
def differences(name: str, mode: str) -> np.ndarray:
    """(heads, n): minus the derivative of each prompt's margin as z_h moves to its stand-in."""
    rows = instances()
    z, real = values(name, rows)
    stand = {
        "zero": {layer: torch.zeros_like(t[0, 0]) for layer, t in z.items()},
        "mean": {layer: t[real].mean(0) for layer, t in z.items()},
        "resample": z,
    }[mode]
    heads = [Head(layer, h) for layer in range(2) for h in range(4)]
    up, down = (
        [replaced(name, h, rows, stand, sign * STEP) for h in heads] for sign in (1.0, -1.0)
    )
    return -(np.array(up) - np.array(down)) / (2 * STEP)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attribution_is_the_derivative_towards_the_stand_in(name: str, mode: str) -> None:
    wanted = differences(name, mode)
    found = Attribution(mode).find(bench_of(name))
    assert found.effects is not None and found.effect is not None
    np.testing.assert_allclose(found.effects, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    np.testing.assert_allclose(
        found.effect, wanted.mean(1), rtol=1e-3, atol=1e-4 * np.abs(wanted).max()
    )
    np.testing.assert_array_equal(found.score, np.abs(found.effect))
    assert found.low is None and found.high is None  # intervals are of the signed effect


@pytest.mark.parametrize("mode", ["zero", "resample"])
def test_hisp_takes_the_size_of_each_prompt_and_normalises_by_layer(mode: str) -> None:
    size = np.abs(differences("llama", mode)).mean(1).reshape(2, 4)
    plain = HISP(mode, normalise=False).find(bench_of("llama")).score
    np.testing.assert_allclose(plain, size.ravel(), rtol=1e-3)
    shares = HISP(mode).find(bench_of("llama")).score.reshape(2, 4)
    np.testing.assert_allclose(shares, size / np.sqrt((size**2).sum(1, keepdims=True)), rtol=1e-3)


def test_cancelling_prompts_count_in_hisp_and_not_in_attribution() -> None:
    """Two prompts, the same but for the roles of right and wrong: effects are equal and
    opposite."""
    (one,) = instances(1)
    a, b = one.accept[0][0], one.wrong[0][0]
    pair = tuple(
        Instance(one.ids, one.positions, ((x,),), ((y,),), one.corrupted)
        for x, y in ((a, b), (b, a))
    )
    runs = PairedRuns(hooked("llama"), Prompts(Written(), pair))
    assert Attribution().find(runs).score.max() < 1e-5
    assert HISP(normalise=False).find(runs).score.min() > 1e-3


ADDING = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gpt_oss", "phi3", "neox", "opt"]


@pytest.mark.parametrize("name", ADDING)
def test_outgoing_edges_sum_to_the_attribution_of_the_head(name: str) -> None:
    runs = bench_of(name)
    edges, nodes = EAP().find(runs), Attribution("resample").find(runs)
    assert edges.effect is not None and nodes.effect is not None and edges.edges is not None
    size = np.abs(nodes.effect).max()
    assert size > 1e-4
    np.testing.assert_allclose(edges.effect, nodes.effect, rtol=1e-3, atol=1e-4 * size)
    strongest = edges.edges.assign(size=edges.edges.score.abs()).groupby("sender")["size"].max()
    np.testing.assert_allclose(edges.score, [strongest[str(h)] for h in runs.heads], rtol=1e-5)
    assert edges.edges.score.abs().is_monotonic_decreasing


def test_edges_lead_forwards_only_and_shared_keys_are_one_receiver() -> None:
    llama, neox = (scores(EAP().find(bench_of(name))) for name in ("llama", "neox"))
    assert ("L1H0", "MLP 1", "") in llama and (
        "L1H0",
        "MLP 1",
        "",
    ) not in neox  # blocks in parallel
    assert ("L0H0", "L1KV1", "k") in llama and ("L0H0", "L1KV2", "k") not in llama
    assert ("L0H0", "L1H3", "k") in neox
    for found in (llama, neox):
        assert ("L1H0", "L1H1", "q") not in found and ("L1H0", "L0H1", "v") not in found
        assert ("MLP 1", "MLP 1", "") not in found


def lens_bench() -> PairedRuns:
    """A TransformerLens model with grouped keys and rotation."""
    lens = pytest.importorskip("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        n_ctx=32,
        d_head=8,
        n_heads=4,
        n_key_value_heads=2,
        d_mlp=48,
        d_vocab=101,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        rotary_adjacent_pairs=False,
        final_rms=True,
        seed=0,
        default_prepend_bos=False,
    )
    torch.manual_seed(0)
    model = lens.HookedTransformer(config)
    tiny.stir(model)
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    return PairedRuns(hook(model, name="lens"), Prompts(Written(), instances()[:1]))


def test_transformer_lens_models_have_edges_too() -> None:
    runs = lens_bench()
    edges, nodes = EAP().find(runs), Attribution("resample").find(runs)
    assert edges.effect is not None and nodes.effect is not None
    size = np.abs(nodes.effect).max()
    assert size > 1e-4
    np.testing.assert_allclose(edges.effect, nodes.effect, rtol=1e-3, atol=1e-4 * size)
    assert ("L0H0", "L1KV1", "k") in scores(edges)


# --- integrated gradients
# ---------------------------------------------------------------------------------------------


def test_one_step_from_the_inputs_is_eap() -> None:
    runs = bench_of("llama")
    plain, integrated = scores(EAP().find(runs)), scores(EAPIG(steps=1).find(runs))
    assert plain.keys() == integrated.keys()
    for edge, value in plain.items():
        assert integrated[edge] == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_points_on_the_left_begin_with_the_corrupted_run() -> None:
    """One step there is EAP with the twins' roles exchanged, with the other sign."""
    rows = instances(2)
    exchanged = tuple(Instance(i.corrupted, i.positions, i.accept, i.wrong, i.ids) for i in rows)
    found = scores(EAPIG.make("code", steps=1).find(bench_of("llama", 2)))
    other = scores(EAP().find(PairedRuns(hooked("llama"), Prompts(Written(), exchanged))))
    size = max(map(abs, found.values()))
    for edge, value in other.items():
        assert found[edge] == pytest.approx(-value, rel=2e-3, abs=1e-4 * size)


def test_presets_are_the_papers_text_and_the_released_code() -> None:
    """Of four steps, three lie at the same points: the sums differ by the ends alone."""
    paper, code = (EAPIG.make(name, steps=4) for name in ("paper", "code"))
    assert (paper.points, code.points) == ("right", "left") and EAPIG() == EAPIG.make("paper")
    right, left, one, none = (
        scores(method.find(bench_of("gpt2", 2)))
        for method in (paper, code, EAPIG(steps=1), EAPIG(steps=1, points="left"))
    )
    size = max(map(abs, right.values()))
    for edge in list(right)[::37]:
        gap = (one[edge] - none[edge]) / 4
        assert right[edge] - left[edge] == pytest.approx(gap, rel=2e-3, abs=1e-4 * size)


def extrapolated(of: Any, steps: int) -> float:
    """The limit of sums over the last points of `steps` and 2 · `steps` intervals, whose error
    halves."""
    return 2 * of(2 * steps) - of(steps)


def test_edges_of_the_input_add_up_to_the_change_of_the_metric() -> None:
    runs = bench_of("gpt2", 2)
    wanted = float((runs.margins() - runs.margins(corrupted=True)).mean())

    def total(steps: int) -> float:
        edges = EAPIG(steps=steps).find(runs).edges
        assert edges is not None
        return float(edges[edges.sender == "input"].score.sum())

    assert extrapolated(total, 16) == pytest.approx(wanted, rel=0.02)


def test_edges_of_a_layer_add_up_to_what_resampling_it_does() -> None:
    model = hook(tiny.build("llama", num_hidden_layers=1), name="llama")
    runs = PairedRuns(model, Prompts(Written(), instances(1)))
    ends = {0: runs.heads}
    clean = runs.margins()
    effects = {
        steps: EAPIG(steps=steps, mode="activations").find(runs).effect for steps in (16, 32)
    }
    for heads in ends.values():
        rows = [runs.index[h] for h in heads]
        wanted = float((clean - next(iter(runs.ablated([heads], "resample")))).mean())
        total = extrapolated(lambda steps, rows=rows: float(effects[steps][rows].sum()), 16)
        assert total == pytest.approx(wanted, rel=0.02, abs=0.002)


def test_settings_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: Attribution("median"),
        lambda: HISP("median"),
        lambda: EAPIG(steps=0),
        lambda: EAPIG(mode="weights"),
        lambda: EAPIG(points="middle"),
    ):
        with pytest.raises(InputError):
            make()


def test_passes_are_counted() -> None:
    for method, forwards, backwards in (
        (Attribution(), 2, 1),
        (HISP(), 1, 1),
        (EAP(), 3, 1),
        (EAPIG(), 8, 5),
    ):
        runs = bench_of("llama")
        method.find(runs)
        assert (runs.forwards, runs.backwards) == (forwards, backwards), method.name
