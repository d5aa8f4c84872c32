"""The planted models do their task, by the circuit that is said to do it and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch

import interp
from interp.circuits import planted
from interp.circuits.known.planted import Planted, RepeatedPair
from interp.edits import Ablate
from interp.errors import InputError, UnknownNameError
from interp.inputs.tokenizer import Text
from interp.tasks.answers import judge
from interp.tasks.task import Instance
from interp_hooks import Head

NAMES = ("induction", "ioi")
N = 24
HELD_OUT = 1234  # a seed of prompts that no weight was chosen on


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> Planted:
    return planted.get(request.param)


@pytest.fixture(scope="module")
def ioi() -> Planted:
    return planted.get("ioi")


def others(made: Planted) -> list[Head]:
    return [h for h in made.model.heads if h not in made.truth.heads]


def judged(made: Planted, edits: Sequence[Ablate] = ()) -> np.ndarray:
    """(N, 2): correct and margin on held-out prompts."""
    instances = made.task.sample(made.model.tokenizer, N, HELD_OUT)
    return np.array(judge(made.model, made.task, instances, edits))


def ablated(made: Planted, heads: Sequence[Head], mode: str = "mean") -> np.ndarray:
    """As `judged`; the reference is the corrupted prompts of the toolkit's task of the same
    name."""
    return judged(made, [Ablate(heads, mode, reference=None if mode == "zero" else made.name)])


def weights_of(made: Planted) -> dict[Head, dict[str, torch.Tensor]]:
    """head → W_Q, W_K, W_V (width, d_head) as q, k, v, and W_O (d_head, width) as out."""
    found = {}
    for layer in range(made.model.n_layers):
        w = made.model.head_weights(layer)
        for head in range(made.model.n_heads):
            found[Head(layer, head)] = dict(
                q=w.W_Q[head], k=w.W_K[head], v=w.W_V[head], out=w.W_O[head]
            )
    return found


def observed(made: Planted, ids: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """layer → (heads, queries): the key that each query looks at most."""
    with torch.no_grad(), made.model.observe("argmax") as seen:
        made.model(input_ids=torch.tensor([ids]))
    return {layer: seen[layer].argmax[0] for layer in range(made.model.n_layers)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [*product(NAMES, (0, 5)), ("ioi", 11)])
def test_the_model_does_its_task(name: str, seed: int) -> None:
    made = planted.get(name, seed)
    found = interp.evaluate(made.model, made.task, n=100, seed=HELD_OUT)
    assert found.baseline.mean >= 0.98
    assert found.frame.baseline_margin.min() > 2 and found.frame.baseline_margin.mean() > 10


def test_the_planted_ioi_does_the_toolkits_own_task(ioi: Planted) -> None:
    assert ioi.task == interp.tasks.get("ioi")


def test_corrupted_prompts_take_the_answer_away(made: Planted) -> None:
    instances = made.task.sample(made.model.tokenizer, 2 * N, HELD_OUT)
    with torch.no_grad():
        margins = [
            made.task.score(
                made.model.logits(torch.tensor([i.corrupted]))[0, list(i.positions)], i
            )[1]
            for i in instances
        ]
    assert abs(np.mean(margins)) < 1.0  # of more than ten


def test_repeated_pairs_are_as_described(made: Planted) -> None:
    text = Text(made.model.tokenizer)
    for i, one in enumerate(RepeatedPair().sample(made.model.tokenizer, 200, 3)):
        ids, first = one.ids, one.info["first"]
        assert len(ids) == len(one.corrupted) == 28 and one.positions == (27,)
        assert ids[: len(text.bos)] == tuple(text.bos)
        assert ids[first] == ids[-1] and ids.count(ids[-1]) == 2 and len(set(ids)) == 27
        assert one.accept == ((ids[first + 1],),)
        assert [k for k in range(28) if ids[k] != one.corrupted[k]] == [first]
        assert one.corrupted[first] not in ids and one.corrupted.count(ids[-1]) == 1
        (wrong,) = one.wrong
        assert len(set(wrong)) == 4 and set(wrong) <= set(ids[1:]) - {ids[-1], ids[first + 1]}
        assert first + 1 < 27, i
    with pytest.raises(InputError, match="10 tokens"):
        RepeatedPair(length=9)


# --- the truth, by ablation
# -------------------------------------------------------------------------------------------


def test_the_truth_names_a_few_of_many_heads(made: Planted) -> None:
    truth = made.truth
    assert (truth.n_layers, truth.n_heads) == (made.model.n_layers, made.model.n_heads) == (4, 8)
    stages = {kind: len(heads) for kind, heads in truth.classes().items()}
    assert stages in (
        {"previous token": 1, "induction": 1},
        {"duplicate token": 2, "S-inhibition": 2, "name mover": 3},
    )
    for sender, receiver, _ in truth.edges:
        assert sender.layer < receiver.layer and {sender, receiver} <= set(truth.heads)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_the_other_heads_do_nothing(made: Planted, mode: str) -> None:
    """The circuit alone does the task, as well as with the rest."""
    found = ablated(made, others(made), mode)
    change = np.abs(found[:, 1] / judged(made)[:, 1] - 1)
    assert 0 < change.max() < 0.02  # they were there
    assert found[:, 0].mean() >= 0.98


@pytest.mark.slow
def test_without_a_stage_the_task_is_lost(made: Planted) -> None:
    for kind, heads in made.truth.classes().items():
        assert ablated(made, heads)[:, 0].mean() <= 0.15, kind


@pytest.mark.slow
def test_every_head_of_the_circuit_matters(made: Planted) -> None:
    margin = judged(made)[:, 1].mean()
    for head in made.truth.heads:
        assert 1 - ablated(made, [head])[:, 1].mean() / margin > 0.1, head


def test_evaluate_tells_the_same_story(ioi: Planted) -> None:
    movers = ioi.truth.classes()["name mover"]
    found = interp.evaluate(
        ioi.model, ioi.task, [Ablate(movers, "mean", "ioi")], n=N, seed=HELD_OUT
    )
    assert found.baseline.mean >= 0.98 and found.edited is not None and found.edited.mean <= 0.15


# --- the truth, in the weights
# ----------------------------------------------------------------------------------------


def test_heads_compose_along_the_edges_and_nowhere_else(made: Planted) -> None:
    """‖W_O of the sender · W_Q, W_K or W_V of the receiver‖ is zero but for the edges."""
    weights = weights_of(made)
    for sender, receiver in product(made.model.heads, made.truth.heads):
        for part in ("q", "k", "v") if sender.layer < receiver.layer else ():
            size = float((weights[sender]["out"] @ weights[receiver][part]).norm())
            linked = (sender, receiver, part) in made.truth.edges
            assert size > 0.3 if linked else size < 1e-4, (sender, receiver, part, size)


def test_the_other_heads_write_what_nothing_reads(made: Planted) -> None:
    weights = weights_of(made)
    readers = torch.cat(
        [w[part] for w in weights.values() for part in "qkv"], 1
    ).detach()  # (width, …)
    unembedding = made.model.module.lm_head.weight.detach().T  # (width, vocabulary)
    for head in others(made):
        out = weights[head]["out"]
        assert (
            float(out.norm()) > 1 and not (out @ readers).any() and not (out @ unembedding).any()
        ), head
    last = [h for h in made.truth.heads if (weights[h]["out"] @ unembedding).any()]
    assert last == made.truth.classes()["induction" if made.name == "induction" else "name mover"]


def test_the_other_heads_are_of_the_circuits_size_and_attend(made: Planted) -> None:
    """Random ones, that is; weights like the circuit's on average, and no uniform attention."""
    decoys = [Head.parse(word) for word in made.truth.notes[0].split() if word.startswith("L")]
    assert len(decoys) == 2 and not set(decoys) & set(made.truth.heads)
    weights = weights_of(made)
    for name in ("q", "k", "v", "out"):
        expected = np.mean([float(weights[h][name].norm()) for h in made.truth.heads])
        for head in set(others(made)) - set(decoys):
            assert float(weights[head][name].norm()) == pytest.approx(expected, rel=1e-4), (
                name,
                head,
            )
    ids = [torch.tensor([i.ids]) for i in made.task.sample(made.model.tokenizer, 4, HELD_OUT)]
    with torch.no_grad(), made.model.observe("max", reduce="mean") as seen:
        for row in ids:
            made.model(input_ids=row)
    for head in others(made):
        assert float(seen[head.layer].max[:, head.head].mean()) > 1.5 / 15, head


def test_layer_norm_is_the_identity_to_within_one_percent(made: Planted) -> None:
    norms = [block.ln_1 for block in made.model.module.transformer.h] + [
        made.model.module.transformer.ln_f
    ]
    instance = made.task.sample(made.model.tokenizer, 1, HELD_OUT)[0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        n.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for n in norms
    ]
    try:
        with torch.no_grad():
            made.model(input_ids=torch.tensor([instance.ids]))
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 5
    for before, after in seen:
        assert float((after - before).norm(dim=-1).div(before.norm(dim=-1)).max()) < 0.01


# --- what the heads look at
# -------------------------------------------------------------------------------------------


def test_the_induction_pair_looks_where_it_should() -> None:
    made = planted.get("induction")
    (previous,), (induction,) = made.truth.classes().values()
    for instance in made.task.sample(made.model.tokenizer, 8, HELD_OUT):
        looks = observed(made, instance.ids)
        assert looks[previous.layer][previous.head].tolist() == [0, *range(27)]
        at = looks[induction.layer][induction.head].tolist()
        assert at == [0] * 27 + [
            instance.info["first"] + 1
        ]  # the sink, where nothing was seen before
        corrupted = observed(made, instance.corrupted)
        assert corrupted[induction.layer][induction.head].tolist() == [0] * 28


def places(instance: Instance, made: Planted) -> tuple[int, int, int, int]:
    """Positions of IO, S1, S2 and the last token."""
    text = Text(made.model.tokenizer)
    io, subject = text.one(instance.info["io"]), text.one(instance.info["subject"])
    first = instance.ids.index(subject)
    return (
        instance.ids.index(io),
        first,
        instance.ids.index(subject, first + 1),
        len(instance.ids) - 1,
    )


def test_the_ioi_stages_look_where_they_should(ioi: Planted) -> None:
    stages = ioi.truth.classes()
    for instance in ioi.task.sample(ioi.model.tokenizer, 12, HELD_OUT):
        io, s1, s2, end = places(instance, ioi)
        looks = observed(ioi, instance.ids)
        for head in stages["duplicate token"]:
            found = looks[head.layer][head.head].tolist()
            assert found == [s1 if t == s2 else 0 for t in range(end + 1)]
        for head in stages["S-inhibition"]:
            assert looks[head.layer][head.head][end] == s2
        for head in stages["name mover"]:
            assert looks[head.layer][head.head][end] == io
        corrupted = observed(ioi, instance.corrupted)
        for head in (*stages["duplicate token"], *stages["S-inhibition"]):
            assert corrupted[head.layer][head.head].tolist() == [0] * (end + 1)


def test_a_seed_fixes_everything_and_another_changes_it() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (planted.get("ioi", seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.truth == same.truth and one.truth.heads != other.truth.heads
    for a, b in zip(one.model.module.parameters(), same.model.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.model.module.lm_head.weight, other.model.module.lm_head.weight)


def test_gradients_reach_every_head_of_the_circuit(made: Planted) -> None:
    """Attention is not saturated where heads compose: the margin has a gradient at the weights of
    each of them."""
    module = made.model.module
    instance = made.task.sample(made.model.tokenizer, 1, HELD_OUT)[0]
    logits = module(input_ids=torch.tensor([instance.ids])).logits[0, -1]
    module.zero_grad()
    (logits[instance.accept[0][0]] - logits[list(instance.wrong[0])].mean()).backward()
    size = {
        h: float(
            module.transformer.h[h.layer]
            .attn.c_proj.weight.grad[64 * h.head : 64 * (h.head + 1)]
            .norm()
        )
        for h in made.truth.heads
    }
    assert min(size.values()) > 0.01, size
    module.zero_grad(set_to_none=True)


def test_names_that_are_none() -> None:
    assert planted.names() == list(NAMES)
    with pytest.raises(UnknownNameError, match="did you mean induction"):
        planted.get("inductoin")
    with pytest.raises(InputError, match="seed"):
        planted.get("ioi", -1)
