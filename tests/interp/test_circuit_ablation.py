"""Head ablation against plain hooks on an untapped model, truth by brute force, stability, and
every method's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import interp
from interp.atlas import Atlas
from interp.circuits import (
    Circuit,
    evaluate,
    find,
    measured,
    planted,
    published,
    published_names,
    registry,
    resampled,
)
from interp.circuits.finding import circuit_of
from interp.circuits.methods.circuit_method import Method
from interp.circuits.methods.head_ablation import HeadAblation, by_effects
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.prompts import from_task
from interp.errors import InputError, UnknownNameError
from interp.results.circuit_table import Search
from interp.results.head_table import KEYS
from interp.support.statistics import Interval, resampled_means
from interp.tasks import get
from interp_hooks import Head

pytestmark = pytest.mark.slow  # every head of planted models is ablated

CHEAP = ("head_ablation", "attribution", "eap", "hisp", "path_patching")


def by_hand(
    twin: Any, prompts: Any, layer: int, head: int, mode: str, means: dict[int, torch.Tensor]
) -> np.ndarray:
    """Margins of an eager model, prompt by prompt without padding, one head's z replaced by a hook
    on W_O's input."""
    found = []
    for instance in prompts.instances:
        ids, other = torch.tensor([instance.ids]), torch.tensor([instance.corrupted])
        kept: dict[int, torch.Tensor] = {}

        def keep(z: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[layer] = z.clone()
            return z

        with torch.no_grad(), tiny.rewriting_z(twin, layer, keep):
            twin(input_ids=other, use_cache=False)

        def replace(z: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            z = z.clone()
            given = {"zero": 0.0, "mean": means[layer][head], "resample": kept[layer][:, :, head]}[
                mode
            ]
            z[:, :, head] = given
            return z

        with torch.no_grad(), tiny.rewriting_z(twin, layer, replace):
            logits = twin(input_ids=ids, use_cache=False).logits[0, list(instance.positions)]
        found.append(prompts.task.score(logits, instance)[1])
    return np.array(found)


def means_by_hand(twin: Any, prompts: Any) -> dict[int, torch.Tensor]:
    """layer → (heads, d): mean z over all tokens of the corrupted prompts."""
    found = {}
    for layer in range(2):
        kept: list[torch.Tensor] = []
        for instance in prompts.instances:
            with (
                torch.no_grad(),
                tiny.rewriting_z(twin, layer, lambda z, kept=kept: kept.append(z[0].clone()) or z),
            ):
                twin(input_ids=torch.tensor([instance.corrupted]), use_cache=False)
        found[layer] = torch.cat(kept).mean(0)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_effects_equal_plain_hooks_on_unpadded_prompts(worded: Any, name: str, mode: str) -> None:
    model, twin = worded(name)
    prompts = from_task(model, "ioi", 6)  # prompts of several lengths, so that the runs pads
    assert len({len(i.ids) for i in prompts.instances}) > 1
    found = HeadAblation(mode).find(PairedRuns(model, prompts))
    assert found.effects is not None
    means = means_by_hand(twin, prompts)
    plain = np.array(
        [
            prompts.task.score(
                twin(input_ids=torch.tensor([i.ids])).logits[0, list(i.positions)].detach(), i
            )[1]
            for i in prompts.instances
        ]
    )
    for layer, head in ((0, 0), (0, 3), (1, 2)):
        wanted = plain - by_hand(twin, prompts, layer, head, mode, means)
        np.testing.assert_allclose(found.effects[4 * layer + head], wanted, atol=2e-4)
    np.testing.assert_allclose(found.score, np.abs(found.effects.mean(1)))


def test_replacing_every_head_by_its_twin_is_the_corrupted_run_but_for_the_embedding(
    pocket: Any,
) -> None:
    """IOI prompts and their twins end in the same tokens, so with all z replaced the last position
    can't tell."""
    runs = PairedRuns(pocket, from_task(pocket, "ioi", 8))
    (margins,) = runs.ablated([runs.heads], "resample")
    np.testing.assert_allclose(margins, runs.margins(corrupted=True), atol=1e-3)


def test_bootstrap_means_have_the_right_mean_and_spread() -> None:
    effects = np.random.default_rng(0).normal(2.0, 3.0, (4, 50))
    means = resampled_means(effects, 0)
    np.testing.assert_allclose(means.mean(1), effects.mean(1), atol=0.05)
    np.testing.assert_allclose(means.std(1), effects.std(1) / np.sqrt(50), rtol=0.1)


def test_intervals_are_signed_and_hold_0_where_nothing_happens() -> None:
    """2,000 heads without an effect: about one in twenty is significant by chance, not every
    one."""
    made = planted.get("ioi")
    prompts = from_task(made.model, made.task, 48)
    runs = PairedRuns(made.model, prompts)
    draws = np.random.default_rng(0).normal(0.0, 1.0, (2000, 48))
    outside = 0
    for start in range(0, 2000, len(runs.heads)):
        null = draws[(np.arange(len(runs.heads)) + start) % 2000]
        about = Search("ioi", "head_ablation", 48, *[Interval(0, 0, 0, 48)] * 3, 0, 0, 0)
        frame = circuit_of(runs, HeadAblation(), by_effects(null), about, {}, []).frame
        low, high = frame.head_ablation_effect_low, frame.head_ablation_effect_high
        assert (low < frame.head_ablation_effect).all()
        assert (frame.head_ablation_effect < high).all()
        outside += int(((low > 0) | (high < 0)).sum())
    assert 0.03 < outside / 2000 < 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_layers_before_the_head_do_not_run_again(worded: Any, name: str) -> None:
    """And the margins are those of whole runs, to the bit."""
    model = worded(name)[0]
    runs = PairedRuns(model, from_task(model, "ioi", 5))
    batches = runs.batches()
    (blocks,), (pairs,) = runs.clean_blocks(batches), batches
    assert sorted(blocks) == runs.layers
    stand_ins = runs.stand_ins(pairs, "resample")
    for head in runs.heads:
        ran: list[int] = []
        handles = [
            block.register_forward_pre_hook(lambda m, a, n=n, ran=ran: ran.append(n))
            for n, block in enumerate(tiny.layers(model.module))
        ]
        found = runs.without(pairs, [head], stand_ins, blocks)
        for handle in handles:
            handle.remove()
        assert torch.equal(found, runs.without(pairs, [head], stand_ins))
        assert ran == list(range(head.layer, model.n_layers)) or head.layer == 0


def test_blocks_that_are_too_much_to_hold_are_not_held(
    worded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = worded("llama")[0]
    runs = PairedRuns(model, from_task(model, "ioi", 5))
    monkeypatch.setattr("interp.circuits.runs.paired_runs.HELD", 1000)
    assert runs.clean_blocks(runs.batches()) == [{}]
    monkeypatch.undo()
    monkeypatch.setattr(PairedRuns, "_resumes", lambda *a: False)
    assert runs.clean_blocks(runs.batches()) == [{}]


def test_an_interrupted_ablation_resumes_and_gives_the_same(
    pocket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = find(pocket, "ioi", "head_ablation", n=6)
    runs: list[int] = []
    without = PairedRuns.without
    monkeypatch.setattr(
        PairedRuns, "without", lambda self, *a, **k: runs.append(1) or without(self, *a, **k)
    )

    def stop(done: int, total: int, what: str) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(pocket, "ioi", "head_ablation", n=6, resume=tmp_path, progress=stop)
    assert len(runs) == 10
    again = find(pocket, "ioi", "head_ablation", n=6, resume=tmp_path)
    assert (
        len(runs) == 32
        and again.frame.equals(whole.frame)
        and again.search.forwards == whole.search.forwards
    )
    assert not (tmp_path / "partial").exists()
    # other prompts are another search
    with pytest.raises(KeyboardInterrupt):
        find(pocket, "ioi", "head_ablation", n=6, resume=tmp_path, progress=stop)
    find(pocket, "ioi", "head_ablation", n=6, seed=1, resume=tmp_path)
    assert len(runs) == 32 + 10 + 32


# --- truth by brute force
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", planted.names())
def test_brute_force_finds_exactly_the_planted_circuit(name: str) -> None:
    made = planted.get(name)
    found = measured(made.model, made.task, n=32)
    assert set(found.heads) == set(made.truth.heads)
    assert set(found.heads.values()) == {"helps"} and found.complete
    assert len(found.effects) == made.truth.matrix().size


def test_committed_truths_are_what_the_code_measures(pocket: Any) -> None:
    """pocket-llama's bundled truths on fewer prompts: the strongest effects agree, and so do their
    signs."""
    assert {t for t, m in published_names() if m == "pocket-llama"} >= {
        "ioi",
        "greater_than",
        "docstring",
    }
    truth = published("ioi", "pocket-llama")
    again = measured(pocket, "ioi", n=64, seed=5)
    strong = [h for h, e in truth.effects.items() if abs(e) >= 0.25]
    assert len(strong) >= 3 and set(strong) <= set(again.heads)
    for head in strong:
        assert again.effects[head] == pytest.approx(truth.effects[head], abs=0.1)
    assert "exhaustive mean ablation" in truth.source
    with pytest.raises(UnknownNameError, match="pocket-llama"):
        published("ioi", "pocket-lama")


def test_truth_and_methods_see_different_prompts(pocket: Any) -> None:
    from interp.circuits.measured import APART

    seen = {i.ids for i in from_task(pocket, "ioi", 2048, APART).instances}
    assert not seen & {i.ids for i in from_task(pocket, "ioi", 128, 0).instances}


def test_stability_is_one_where_the_prompts_do_not_matter(pocket: Any) -> None:
    class Constant(Method):
        name = "constant"

        def find(self, runs: PairedRuns) -> Any:
            from interp.circuits.methods.circuit_method import Found

            return Found(np.arange(len(runs.heads), dtype=float))

    assert resampled(pocket, "ioi", Constant(), k=5, resamples=4, n=4).mean == 1.0
    real = resampled(pocket, "ioi", "attribution", k=4, resamples=5, n=12)
    assert 0.3 < real.mean <= 1.0 and real.n == 5 and not real.reportable  # too few resamples
    with pytest.raises(InputError, match="two or more"):
        resampled(pocket, "ioi", "attribution", k=4, resamples=1, n=4)
    with pytest.raises(InputError, match="32 heads"):
        resampled(pocket, "ioi", "attribution", k=32, resamples=2, n=4)


# --- every method's table
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CHEAP)
def test_tables_join_with_an_atlas_and_load_again(pocket: Any, method: str, tmp_path: Path) -> None:
    circuit = find(pocket, "ioi", method, n=8)
    assert list(circuit.frame.columns[:5]) == list(KEYS) and circuit.column == method
    assert (circuit.frame[method] >= 0).all() and len(circuit.frame) == 32
    rows = pd_rows(circuit)
    atlas = Atlas(
        circuit.frame[list(KEYS)].assign(sink=np.linspace(0, 1, 32)), {"model": pocket.name}
    )
    joined = circuit.frame.merge(atlas.frame, on=list(KEYS))
    assert (
        len(joined) == 32
        and np.isclose(joined[method], [rows[h] for h in circuit_heads(joined)]).all()
    )
    circuit.save(tmp_path)
    again = Circuit.load(tmp_path)
    assert (
        again.frame.equals(circuit.frame)
        and again.edges.equals(circuit.edges)
        and again.search == circuit.search
    )
    assert Atlas.load(tmp_path).scores == circuit.scores
    for key in ("model", "weights_hash", "inputs_hash", "versions", "settings", "created"):
        assert again.provenance[key]
    assert again.provenance["seed"] == 0
    assert again.provenance["settings"]["task"] == "ioi"
    for name, value in (
        registry.get(method)().record().items()
    ):  # a tuple comes back from JSON as a list
        kept = again.provenance["settings"][f"{method}.{name}"]
        assert kept == (list(value) if isinstance(value, tuple) else value)


def circuit_heads(frame: Any) -> list[Head]:
    return [Head(layer, head) for layer, head in zip(frame["layer"], frame["head"], strict=True)]


def pd_rows(circuit: Circuit) -> dict[Head, float]:
    return dict(zip(circuit_heads(circuit.frame), circuit.frame[circuit.column], strict=True))


@pytest.mark.parametrize("name", planted.names())
@pytest.mark.parametrize("method", ["attribution", "eap", "eap_ig", "hisp", "head_ablation"])
def test_methods_find_the_planted_circuits(name: str, method: str) -> None:
    made = planted.get(name)
    assert evaluate(find(made.model, made.task, method, n=12), made.truth).auc == 1.0


def test_methods_run_inside_nothing_that_is_active(pocket: Any) -> None:
    plain = find(pocket, "ioi", "attribution", n=6)
    with pocket.edit(interp.edits.Ablate("0.3")):
        inside = find(pocket, "ioi", "attribution", n=6)
    assert inside.frame.equals(plain.frame)


def test_induction_has_many_judged_positions(pocket: Any) -> None:
    """Log-probabilities at 49 positions: a metric without wrong tokens works too."""
    circuit = find(pocket, get("induction"), "head_ablation", n=6, mode="mean")
    assert circuit.heads(1)[0].layer in (0, 1) and circuit.search.clean.mean < 0
