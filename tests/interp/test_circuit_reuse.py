"""Stages and repair on a planted circuit, whose answers are known; the overlap's chance by drawing;
pocket-llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import interp
from interp.circuits import planted
from interp.circuits.judging.reuse import Reuse, chance, repair, reuse, wrong_tokens
from interp.circuits.methods.path_stages import stages
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import Prompts, from_task
from interp.edits import Ablate
from interp.errors import InputError
from interp.tasks.ioi import IndirectObject
from interp.tasks.task import Instance
from interp_hooks import Head, HookedModel
from interp_hooks.errors import HeadError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def known() -> planted.Planted:
    return planted.get("ioi")


def of_role(known: planted.Planted, role: str) -> set[Head]:
    return {h for h, r in known.truth.heads.items() if r == role}


# --- stages and overlap
# -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_are_the_planted_circuit_s_layers(known: planted.Planted) -> None:
    """Name movers write the answer; S-inhibition heads set their queries; duplicate-token heads
    give these values."""
    runs = PairedRuns(known.model, from_task(known.model, known.task, 4, 0))
    found = stages(runs, share=0.0, at_least=8, depth=3, activations=("q", "v"))
    assert [set(stage.heads) for stage in found] == [
        of_role(known, role) for role in ("name mover", "S-inhibition", "duplicate token")
    ]
    assert [stage.receivers[0][-1] for stage in found[1:]] == ["q", "v"]
    assert len(stages(runs, share=0.0, at_least=1, depth=1)[0].heads) == 1


@pytest.mark.slow
def test_a_task_shares_all_heads_with_itself(known: planted.Planted) -> None:
    swapped = IndirectObject("swap")
    found = reuse(known.model, known.task, swapped, 4, at_least=3, activations=("q",))
    assert found.tasks == ("ioi_1", "ioi_2") and found.overlap == 1 and found.p < 0.01
    assert set(found.shared) == of_role(known, "name mover") | of_role(known, "S-inhibition")
    marked = {Head(r.layer, r.head) for r in found.frame.itertuples() if r.shared}
    assert marked == set(found.shared)
    first = found.frame[found.frame.ioi_1 == 1]
    assert {Head(r.layer, r.head) for r in first.itertuples()} == of_role(known, "name mover")
    assert found.by_stage.overlap.tolist() == [1, 1] and "q" in found.by_stage.ioi_2_to[1]


def test_chance_is_that_of_random_draws() -> None:
    """The exact distribution against drawing B's heads anew in each layer."""
    sizes = {0: 6, 1: 8, 3: 5}
    one = [Head(0, 1), Head(0, 2), Head(1, 0), Head(1, 3), Head(1, 5), Head(3, 4)]
    two = [Head(0, 2), Head(1, 0), Head(1, 3), Head(3, 4), Head(3, 1)]
    expected, p = chance(one, two, sizes)
    rng, shared = np.random.default_rng(0), []
    for _ in range(20_000):
        drawn = {
            Head(layer, int(h))
            for layer, n in sizes.items()
            for h in rng.choice(n, sum(t.layer == layer for t in two), replace=False)
        }
        shared.append(len(drawn & set(one)))
    assert expected == pytest.approx(np.mean(shared) / len(two), abs=0.01)
    assert p == pytest.approx(np.mean(np.array(shared) >= len(set(one) & set(two))), abs=0.01)
    assert chance(one, one, sizes)[1] < p < chance(one, [Head(0, 0), Head(1, 1)], sizes)[1] == 1.0
    assert chance([], [], sizes) == (0.0, 1.0)
    everything = [Head(layer, h) for layer, n in sizes.items() for h in range(n)]
    assert chance(everything, two, sizes) == pytest.approx((1.0, 1.0))


@pytest.mark.slow
def test_pocket_llama_on_both_tasks(pocket: HookedModel) -> None:
    found = reuse(pocket, n=12)
    assert isinstance(found, Reuse) and found.tasks == ("ioi", "colored_objects")
    # both are answered by the same movers, chosen by other heads
    assert found.by_stage.overlap[0] >= 2 / 3 and Head(2, 0) in found.shared
    assert found.heads(0)[:2] == [Head(2, 0), Head(2, 1)]
    assert 0 < found.overlap < 1 and 0 < found.p <= 1 and "colored_objects in ioi" in repr(found)
    assert len(found.frame) == 32 and found.provenance["forwards"] > 100
    both = set(found.heads(0)) & set(found.heads(1))
    assert found.overlap == len(both) / len(set(found.heads(1)))


def test_heads_that_lost_their_attention_are_told_where_to_look(known: planted.Planted) -> None:
    """S-inhibition heads with uniform attention say nothing of the subject; looking at its second
    mention, they do."""
    heads = sorted(of_role(known, "S-inhibition"))
    broken = [Ablate(heads, "uniform")]
    found = repair(known.model, known.task, heads, n=24, edits=broken, controls=4)
    assert found.evaluation.baseline.mean < 0.7 and found.evaluation.edited is not None
    assert found.evaluation.edited.mean == 1.0 and found.evaluation.mcnemar is not None
    assert found.evaluation.mcnemar.worse == 0 and found.evaluation.mcnemar.p < 0.05
    assert (found.controls < 0.8).all() and found.p == 0.2  # 1 of 5
    right = repair(
        known.model, known.task, heads, lambda i: [i.ids.index(i.accept[0][0])], n=24, edits=broken
    )
    assert (
        right.evaluation.edited is not None and right.evaluation.edited.mean == 0.0
    )  # they inhibit the right name


def test_movers_say_what_they_look_at(known: planted.Planted) -> None:
    heads = of_role(known, "name mover")
    on = {}
    for name, keys in (("wrong", None), ("right", lambda i: [i.ids.index(i.accept[0][0])])):
        on[name] = repair(known.model, known.task, heads, keys, n=8, controls=0).evaluation
    assert on["wrong"].edited.mean == 0 and on["right"].edited.mean == 1  # type: ignore[union-attr]
    margins = {k: v.frame.edited_margin.mean() for k, v in on.items()}
    assert margins["wrong"] < 0 < margins["right"]


def test_movers_of_pocket_llama_that_lost_their_attention(pocket: HookedModel) -> None:
    """They read the colour off the object that is asked for, where it stands in the question; the
    list won't do."""
    movers = "2.0, 2.1, 3.6, 3.3, 3.2"
    broken = [Ablate(movers, "uniform")]

    def asked(i: Instance) -> list[int]:
        word = pocket.tokenizer.encode(f" {i.info['asked']}", add_special_tokens=False)[0]
        return [k for k, token in enumerate(i.prompt) if token == word]

    found = {}
    for name, which in (("list", 0), ("question", -1)):
        result = repair(
            pocket,
            "colored_objects",
            movers,
            lambda i, w=which: [asked(i)[w]],
            n=24,
            edits=broken,
            controls=5,
        )
        found[name] = result.evaluation
        assert result.controls.mean() < 0.7
    assert found["question"].baseline.mean < 0.5 and found["question"].edited.mean > 0.95  # type: ignore[union-attr]
    assert found["question"].mcnemar.p < 0.001  # type: ignore[union-attr]
    assert found["list"].edited.mean < 0.5  # type: ignore[union-attr]


def test_weights_split_what_movers_say(known: planted.Planted) -> None:
    """The planted movers add up what they look at: between right and wrong, the margin is a
    straight line."""
    heads = of_role(known, "name mover")
    prompts = from_task(known.model, known.task, 6, 1)

    def both(i: Instance) -> list[int]:
        return [i.ids.index(i.accept[0][0]), *wrong_tokens(i)]

    margins = []
    for w in (0.0, 0.25, 0.5, 1.0):
        found = repair(known.model, prompts, heads, both, [w, 1 - w], controls=0)
        margins.append(found.evaluation.frame.edited_margin.to_numpy())
    assert (margins[0] < margins[1]).all() and (margins[2] < margins[3]).all()
    for w, margin in zip((0.25, 0.5), margins[1:3], strict=True):
        np.testing.assert_allclose(
            margin, w * margins[3] + (1 - w) * margins[0], rtol=0.02, atol=0.1
        )


def test_wrong_tokens_are_found_where_they_stand_last() -> None:
    instance = Instance((5, 7, 8, 7, 9, 6), (5,), ((8,),), ((7, 9, 44),), (5, 7, 8, 7, 9, 6))
    assert wrong_tokens(instance) == [3, 4]
    with pytest.raises(InputError, match="keys="):
        wrong_tokens(Instance((5, 7), (1,), ((7,),), ((44,),), (5, 5)))


def test_batches_of_many_lengths_keep_their_keys(
    pocket: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = from_task(pocket, "ioi", 12, 0)
    one = repair(pocket, prompts, "0.3", controls=0).evaluation.frame
    monkeypatch.setattr("interp.inputs.batches.BUDGET", 40)
    some = repair(pocket, prompts, "0.3", controls=0).evaluation.frame
    np.testing.assert_allclose(one.edited_margin, some.edited_margin, atol=1e-3)
    assert np.abs(one.edited_margin - one.baseline_margin).min() > 0.05


def test_what_is_refused(pocket: HookedModel) -> None:
    bad: list[tuple[Any, Any]] = [((), InputError), ("9.0", HeadError), ("0.0, 7.1", HeadError)]
    for heads, kind in bad:
        with pytest.raises(kind):
            repair(pocket, "ioi", heads, n=2)
    task = interp.tasks.get("ioi")
    several = Instance((1, 5, 6, 7), (2, 3), ((7,), (8,)), ((9,), (9,)), (1, 4, 6, 7))
    with pytest.raises(InputError, match="several tokens"):
        repair(pocket, Prompts(task, (several,)), "2.0")
    with pytest.raises(InputError, match="can't do ioi"):
        reuse(
            pocket,
            "ioi",
            Prompts(task, (Instance((1, 5, 6), (2,), ((7,),), ((6, 5),), (1, 4, 6)),)),
        )
