"""Faithfulness: planted circuits are enough and all there is; curves against margins under edits,
made another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

import interp
from interp import circuits
from interp.circuits import planted
from interp.circuits.judging.faithfulness import APART, _apart, _curve, faithfulness
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import from_task
from interp.edits import Ablate
from interp.errors import InputError
from interp.evaluation.accuracy import judge
from interp.support.statistics import bootstrap
from interp_hooks import Head, HookedModel, hook

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def known() -> planted.Planted:
    return planted.get("ioi")


def area(y: np.ndarray, x: np.ndarray) -> float:
    return float(sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False)))


def truth_scores(known: planted.Planted) -> np.ndarray:
    return known.truth.matrix().astype(float)


def test_a_planted_circuit_is_faithful_and_nothing_is_left_without_it(
    known: planted.Planted,
) -> None:
    scores = truth_scores(known)
    size, total = int(scores.sum()), scores.size
    found = faithfulness(known.model, scores, known.task, 12, sizes=[size, total - size], orders=2)
    row = found.frame.set_index("k").loc[size]
    assert row.faithfulness == pytest.approx(1, abs=0.1)
    assert row.completeness == pytest.approx(0, abs=0.1)
    assert row.random < 0.5
    # the other way round: the heads outside the circuit first
    other = faithfulness(known.model, 1 - scores, known.task, 12, sizes=[total - size], orders=0)
    row = other.frame.set_index("k").loc[total - size]
    assert row.faithfulness == pytest.approx(0, abs=0.1) and row.completeness == pytest.approx(
        1, abs=0.1
    )
    assert found.random_cpr is not None and other.random_cpr is None
    assert found.cpr > found.random_cpr > other.cpr and found.cmd < other.cmd


def test_the_curve_is_that_of_margins_under_edits(pocket: HookedModel) -> None:
    """By "zero", with `Ablate` in place of activations and `judge` in place of the runs."""
    rng = np.random.default_rng(0)
    scores = rng.random((pocket.n_layers, pocket.n_heads))
    found = faithfulness(
        pocket, scores, "colored_objects", 10, 3, mode="zero", sizes=[2, 20, 31], orders=0
    )
    assert found.frame.k.tolist() == [0, 2, 20, 31, 32]
    prompts = from_task(pocket, "colored_objects", 10, 3 + APART)
    order = sorted(pocket.heads, key=lambda h: -scores[h.layer, h.head])

    def margins(replaced: list[Head]) -> np.ndarray:
        edits = [Ablate(replaced)] if replaced else []
        with torch.no_grad():
            return np.array([m for _, m in judge(pocket, prompts.task, prompts.instances, edits)])

    empty, full = margins(order).mean(), margins([]).mean()
    for row in found.frame.itertuples():
        kept, removed = margins(order[row.k :]).mean(), margins(order[: row.k]).mean()
        assert row.margin == pytest.approx(kept, abs=1e-4) and row.removed_margin == pytest.approx(
            removed, abs=1e-4
        )
        assert row.faithfulness == pytest.approx((kept - empty) / (full - empty), abs=1e-4)
        assert row.completeness == pytest.approx((removed - empty) / (full - empty), abs=1e-4)
        assert row.faithfulness_low - 1e-9 <= row.faithfulness <= row.faithfulness_high + 1e-9
    assert found.full.mean == pytest.approx(full, abs=1e-4) and found.empty.mean == pytest.approx(
        empty, abs=1e-4
    )
    x, f = found.frame.share.to_numpy(), found.frame.faithfulness.to_numpy()
    assert found.cpr == pytest.approx(area(f, x)) and found.mode == "zero"
    assert found.cmd == pytest.approx(area(np.abs(1 - f), x))


def test_the_interval_is_a_bootstrap_of_the_ratio() -> None:
    """Numerator and denominator are resampled together: constant ratios have no spread."""
    rng = np.random.default_rng(1)
    full, empty = rng.normal(5, 1, 40), np.zeros(40)
    found = _curve("f", np.stack([0.3 * full, empty, full]), empty, full, 0)
    for name in ("f", "f_low", "f_high"):
        np.testing.assert_allclose(found[name], [0.3, 0, 1], atol=1e-12)
    loose = _curve("f", rng.normal(2, 1, (1, 40)), empty, full, 0)
    direct = bootstrap((rng.normal(2, 1, 40) / 5).tolist())
    assert 0.3 < (loose["f_high"] - loose["f_low"])[0] / (direct.high - direct.low) < 3


def test_all_heads_of_the_twin_are_the_twin_where_it_ends_alike(pocket: HookedModel) -> None:
    scores = np.arange(32.0).reshape(4, 8)
    found = faithfulness(pocket, scores, "ioi", 8, sizes=[], orders=0)
    assert found.empty.mean == pytest.approx(found.corrupted.mean, abs=1e-4)
    assert found.frame.k.tolist() == [0, 32]
    assert found.frame.faithfulness.tolist() == [0, 1] and found.frame.completeness.tolist() == [
        1,
        0,
    ]


def test_prompts_are_others_than_those_the_circuit_was_found_on(pocket: HookedModel) -> None:
    circuit = circuits.find(pocket, "ioi", "path_patching", n=16, seed=5, senders=("2.0", "2.1"))
    on = {i.ids for i in from_task(pocket, "ioi", 16, 5).instances}
    found = faithfulness(pocket, circuit, n=8, sizes=[2], orders=0)
    assert found.task == "ioi" and found.notes == () and found.provenance["settings"]["n"] == 8
    prompts, _ = _apart(pocket, circuit, None, 40, 5)
    assert len({i.ids for i in prompts.instances}) == 40 and not on & {
        i.ids for i in prompts.instances
    }
    # drawn from the very stream: those that were seen are left out
    prompts, _ = _apart(
        pocket,
        circuits.find(pocket, "ioi", "path_patching", n=16, seed=5 + APART, senders=("2.0",)),
        None,
        24,
        5,
    )
    assert not {i.ids for i in prompts.instances} & {
        i.ids for i in from_task(pocket, "ioi", 16, 5 + APART).instances
    }
    with pytest.raises(InputError, match="found on"):
        faithfulness(pocket, circuit, from_task(pocket, "ioi", 4, 5))
    with pytest.raises(InputError, match="found on"):
        faithfulness(pocket, circuit, from_task(pocket, "ioi", 16, 5))
    other = interp.tasks.get("colored_objects")
    assert "could not be made again" in _apart(pocket, circuit, other, 4, 5)[1][0]


def test_written_prompts_are_known_by_their_hash(pocket: HookedModel) -> None:
    rows = [
        dict(
            clean=f" {a} and {b} and {b} to",
            corrupted=f" {a} and {b} and {a} to",
            answer=f" {a}",
            wrong=f" {b}",
        )
        for a, b in (("Mary", "John"), ("Nancy", "Aaron"))
    ]
    rows = [
        r for r in rows if len(pocket.tokenizer.encode(r["answer"], add_special_tokens=False)) == 1
    ]
    prompts = circuits.prompts.from_texts(pocket, rows)
    circuit = circuits.find(pocket, prompts, "path_patching", force=True, senders=("2.0",))
    with pytest.raises(InputError, match="found on"):
        faithfulness(pocket, circuit, prompts)
    with pytest.raises(InputError, match="which task"):
        faithfulness(pocket, circuit)


def test_what_is_refused(pocket: HookedModel) -> None:
    scores = np.arange(32.0).reshape(4, 8)
    with pytest.raises(InputError, match="finite score"):
        faithfulness(pocket, scores[:3], "ioi", 4)
    with pytest.raises(InputError, match="other heads"):
        faithfulness(pocket, np.arange(40.0).reshape(5, 8), "ioi", 4)
    for size in (40, -1, 1.5):
        with pytest.raises(InputError, match="size"):
            faithfulness(pocket, scores, "ioi", 4, sizes=[size])
    with pytest.raises(InputError, match="which task"):
        faithfulness(pocket, scores)
    with pytest.raises(InputError, match="replaced by"):
        faithfulness(pocket, scores, "ioi", 4, mode="noise")


def test_a_metric_that_heads_do_not_move(tokenizer: Any) -> None:
    hooked = hook(tiny.build("llama", len(tokenizer)), tokenizer=tokenizer)
    for layer in hooked.module.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(InputError, match="faithful to"):
        faithfulness(hooked, np.arange(8.0).reshape(2, 4), "ioi", 4)


def test_sizes_plots_and_words(known: planted.Planted) -> None:
    found = faithfulness(known.model, truth_scores(known), known.task, 4, orders=1)
    assert found.frame.k.tolist() == [
        0,
        1,
        2,
        3,
        6,
        16,
        32,
    ]  # MIB's shares of 32 heads, those below one head are none
    figure = found.plot()
    names = [trace.name for trace in figure.data if trace.name]
    assert names == ["strongest heads kept", "strongest heads removed", "random heads kept"]
    assert "CPR" in repr(found) and "heads" in repr(found)


# --- edges
# ------------------------------------------------------------------------------------------------


def test_without_edges_the_model_is_the_corrupted_run_and_with_all_it_is_itself(
    known: planted.Planted,
) -> None:
    circuit = circuits.find(known.model, known.task, "eap", n=8)
    found = faithfulness(known.model, circuit, n=8, of="edges", sizes=[0.1], orders=1)
    runs = PairedRuns(known.model, _apart(known.model, circuit, None, 8, 0)[0])
    assert found.empty.mean == pytest.approx(runs.margins(corrupted=True).mean(), abs=1e-3)
    assert found.full.mean == pytest.approx(runs.margins().mean(), abs=1e-3)
    assert found.of == "edges" and list(found.frame.k)[-1] == len(circuit.edges)
    assert found.frame.faithfulness.iloc[-1] == pytest.approx(1)
    assert found.frame.faithfulness.iloc[0] == pytest.approx(0)
    assert "edges replaced by resample" in found._repr_html_()


def test_an_edge_that_is_not_kept_carries_what_its_sender_wrote_in_the_twin(
    pocket: HookedModel,
) -> None:
    """All edges kept but that of one head into the output: all else runs as it does, and the output
    reads the stream with that head's z W_O exchanged."""
    circuit = circuits.find(pocket, "ioi", "eap", n=4)
    head, edges = Head(2, 0), circuit.edges
    last = (edges.sender == str(head)) & (edges.receiver == "output")
    edges["score"] = np.where(last, 0.0, 1.0)
    found = faithfulness(pocket, circuit, n=4, of="edges", sizes=[len(edges) - 1], orders=0)
    prompts, _ = _apart(pocket, circuit, None, 4, 0)
    W_O = pocket.head_weights(head.layer).W_O[head.head]
    module, wanted = pocket.module, []
    for i in prompts.instances:
        z = []
        for ids in (i.ids, i.corrupted):
            with torch.no_grad(), pocket.activations("z", "post") as kept:
                module(input_ids=torch.tensor([ids]), use_cache=False)
            z.append(kept["z", head.layer][0, :, head.head])
            if ids == i.ids:
                stream = kept["post", pocket.n_layers - 1][0]
        with torch.no_grad():
            logits = module.lm_head(module.model.norm(stream + (z[1] - z[0]) @ W_O))
        wanted.append(float(prompts.task.margin(logits[list(i.positions)], i)))
    row = found.frame.set_index("k").loc[len(edges) - 1]
    assert row.margin == pytest.approx(np.mean(wanted), abs=1e-3)
    assert abs(row.margin - found.full.mean) > 0.01  # and it matters


def test_edges_are_refused_where_there_are_none(pocket: HookedModel) -> None:
    circuit = circuits.find(pocket, "ioi", "attribution", n=4)
    with pytest.raises(InputError, match="has no edges"):
        faithfulness(pocket, circuit, n=4, of="edges")
    edged = circuits.find(pocket, "ioi", "eap", n=4)
    with pytest.raises(InputError, match="resample, zero"):
        faithfulness(pocket, edged, n=4, of="edges", mode="mean")
    edged.edges.loc[0, "receiver"] = "L9H9"
    with pytest.raises(InputError, match="no edge"):
        faithfulness(pocket, edged, n=4, of="edges")
