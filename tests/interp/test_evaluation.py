"""Measuring edits: the paired tests, saved results, losses of continuations, lengths past the
trained, the examples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

import interp
from interp.edits import ACT, ScaleHeads, ZeroTuning, from_json
from interp.errors import ContextError, InputError, OutputError
from interp.evaluation.accuracy import by_steps
from interp.evaluation.evaluate import evaluate
from interp.evaluation.loss import continuation_loss
from interp.inputs.text import rows_of_text
from interp.results.evaluation import HEAD, ROWS, Evaluation
from interp.support.statistics import McNemar, mcnemar
from interp_hooks import HookedModel

ROOT = Path(__file__).resolve().parents[2]
GAINS = {"0.0": 3.0, "1.1": -2.0}


@pytest.fixture(scope="module")
def pocket() -> HookedModel:
    return interp.load("llama")


def table(both: int, better: int, worse: int, neither: int) -> tuple[list[float], list[float]]:
    pairs = (
        [(1.0, 1.0)] * both + [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(0.0, 0.0)] * neither
    )
    return [b for b, _ in pairs], [a for _, a in pairs]


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 0.0625),
        (6, 0, 0.03125),
        (3, 3, 1.0),
        (1, 9, 22 / 1024),
        (2, 10, 158 / 4096),
    ],
)
def test_mcnemar_by_hand(better: int, worse: int, p: float) -> None:
    assert mcnemar(*table(4, better, worse, 7)) == McNemar(better, worse, p)


def test_mcnemar_is_the_binomial_test() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        both, better, worse, neither = (int(x) for x in rng.integers(0, 60, 4))
        found = mcnemar(*table(both, better, worse, neither))
        assert found is not None
        expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert found.p == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*table(0, 5000, 4000, 0)).p == pytest.approx(
        binomtest(5000, 9000).pvalue, rel=1e-6
    )  # type: ignore[union-attr]


def test_mcnemar_needs_right_or_wrong_and_pairs() -> None:
    assert mcnemar([0.5, 1.0], [1.0, 1.0]) is None
    with pytest.raises(ValueError, match="as many"):
        mcnemar([1.0], [1.0, 0.0])


# --- evaluate, save, load
# ---------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were_saved(worded: Any, tmp_path: Path) -> None:
    model: HookedModel = worded("llama")[0]
    edits = [ScaleHeads(GAINS), ZeroTuning(2.0)]
    result = evaluate(model, "classification", edits, n=12, seed=1, force=True)
    expected = mcnemar(result.frame.baseline.tolist(), result.frame.edited.tolist())
    assert result.mcnemar is not None and result.mcnemar == expected
    found = Evaluation.load(result.save(tmp_path / "a" / "b"))
    assert found.frame.equals(result.frame)
    for name in (
        "task",
        "metric",
        "baseline",
        "edited",
        "difference",
        "mcnemar",
        "notes",
        "provenance",
    ):
        assert getattr(found, name) == getattr(result, name), name
    record = json.loads((tmp_path / "a/b" / HEAD).read_text(encoding="utf-8"))["provenance"]
    assert (
        record["seed"] == 1
        and record["settings"]["n"] == 12
        and record["settings"]["task"] == "classification"
    )
    assert from_json(record["settings"]["edits"]) == edits
    assert {"weights_hash", "inputs_hash", "created", "device"} <= set(
        record
    ) and "torch" in record["versions"]


def test_plain_results_save_too(worded: Any, tmp_path: Path) -> None:
    result = evaluate(worded("llama")[0], "induction", n=2, force=True)
    found = Evaluation.load(result.save(tmp_path))
    assert found.edited is None and found.difference is None and found.mcnemar is None
    assert list(found.frame) == ["baseline", "baseline_margin"]


def test_damaged_results_are_refused(worded: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no evaluation in"):
        Evaluation.load(tmp_path)
    evaluate(worded("llama")[0], "induction", n=2, force=True).save(tmp_path)
    whole = (tmp_path / HEAD).read_text(encoding="utf-8")
    for content, says in [
        ("{", "damaged"),
        ("[]", "not an evaluation"),
        (whole.replace('"n"', '"m"'), "damaged"),
    ]:
        (tmp_path / HEAD).write_text(content, encoding="utf-8")
        with pytest.raises(OutputError, match=says):
            Evaluation.load(tmp_path)
    (tmp_path / HEAD).write_text(whole, encoding="utf-8")
    (tmp_path / ROWS).write_bytes(b"x")
    with pytest.raises(OutputError, match="not the one"):
        Evaluation.load(tmp_path)


def test_command_line_saves(tmp_path: Path) -> None:
    from interp.cli.main import app

    interp.edits.save(tmp_path / "e.json", [ZeroTuning(2.0)])
    arguments = [
        "evaluate",
        "--task",
        "ioi",
        "--n",
        "4",
        "--edit",
        str(tmp_path / "e.json"),
        "--out",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "McNemar" in done.output
    assert Evaluation.load(tmp_path).task == "ioi"
    shown = CliRunner().invoke(app, ["show", str(tmp_path)])  # what was saved, as it was printed
    assert shown.exit_code == 0 and shown.stdout in done.stdout, shown.output
    refused = CliRunner().invoke(app, ["show", str(tmp_path), "--score", "sink"])
    assert refused.exit_code == 2 and "holds an evaluation" in refused.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(metric="bleu"), "no metric 'bleu'"),
        (dict(task="ioi", include_path="."), "lm_eval:NAME"),
        (dict(text="x.txt"), "metric loss"),
        (dict(task="ioi", metric="loss", text="x.txt"), "without a task"),
        (dict(task="ioi", context=64), "no length to choose"),
        (dict(task="bigram_backcopy", limit=0), "at least one"),
        (dict(metric="loss", n=0), "at least one"),
        (dict(task="ioi", seed=-1), "0 or more"),
        (dict(metric="loss", seed=-1), "0 or more"),
    ],
)
def test_options_that_do_not_go_together(worded: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        evaluate(worded("llama")[0], **options)


# --- lengths past the trained one
# -------------------------------------------------------------------------------------


def test_extrapolation_is_asked_for_and_recorded(pocket: HookedModel) -> None:
    with pytest.raises(ContextError, match="--extrapolate"):
        evaluate(pocket, "niah", n=1, context=1536)
    result = evaluate(pocket, "niah", n=1, context=1536, extrapolate=True)
    settings = result.provenance["settings"]
    assert settings["task_settings"]["lengths"] == [1536]
    assert (
        settings["extrapolate"]["positions"] == 1024
        and settings["extrapolate"]["rope"]["rope_type"] == "default"
    )
    assert settings["extrapolate"]["factor"] == pytest.approx(1.5, abs=0.01)
    assert any("× the model's 1024 positions: RoPE" in note for note in result.notes)


def test_within_the_positions_nothing_is_noted(pocket: HookedModel) -> None:
    result = evaluate(pocket, "niah", n=2, context=256, extrapolate=True)
    assert result.provenance["settings"]["extrapolate"] is None
    assert [note.split(":")[0] for note in result.notes] == ["niah"]  # its format alone
    assert 250 <= result.provenance["settings"]["context"] <= 256 and result.baseline.mean == 1


def test_learned_positions_cannot_be_extrapolated(worded: Any) -> None:
    model: HookedModel = worded("gpt2")[0]
    assert model.max_context is not None
    with pytest.raises(ContextError, match="learned positions"):
        evaluate(model, metric="loss", n=1, context=model.max_context + 8, extrapolate=True)


# --- the loss of continuations
# ----------------------------------------------------------------------------------------


def plain_losses(twin: Any, rows: list[list[int]], cuts: list[int]) -> list[float]:
    """One eager forward over each whole text, the continuation's tokens scored."""
    found = []
    for row, cut in zip(rows, cuts, strict=True):
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
        log = torch.log_softmax(logits, -1)
        found.append(float(-torch.stack([log[i - 1, row[i]] for i in range(cut, len(row))]).mean()))
    return found


@contextmanager
def scaled_prompts(twin: Any, layer: int, head: int, gain: float, cut: int) -> Iterator[None]:
    """z of one head × gain in the rows before `cut`, in a model that knows nothing of edits."""
    attention = twin.model.layers[layer].self_attn
    width = attention.head_dim

    def scale(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        z = inputs[0].clone()
        z[:, :cut, head * width : (head + 1) * width] *= gain
        return (z,)

    handle = attention.o_proj.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_continuation_loss_is_the_plain_one(worded: Any, name: str) -> None:
    model, twin = worded(name)
    rows = [
        r[:n]
        for r, n in zip(
            rows_of_text(model.tokenizer, None, 64, 5, 0), (64, 64, 40, 40, 2), strict=True
        )
    ]
    expected = plain_losses(twin, rows, [16, 16, 10, 10, 1])
    for steps in (True, False):
        found = continuation_loss(model, rows, prompt_share=0.25, steps=steps)
        assert found.frame.baseline.tolist() == pytest.approx(expected, abs=1e-4)
        assert found.frame.tokens.tolist() == [48, 48, 30, 30, 1]
        assert (
            found.baseline.mean == pytest.approx(np.mean(expected), abs=1e-4)
            and found.mcnemar is None
        )


def test_prefill_edits_act_on_the_prompt_alone(worded: Any) -> None:
    model, twin = worded("llama")
    rows = rows_of_text(model.tokenizer, None, 48, 3, 1)
    with scaled_prompts(twin, 1, 2, 5.0, 24):
        expected = plain_losses(twin, rows, [24] * 3)
    with scaled_prompts(twin, 1, 2, 5.0, 48):
        everywhere = plain_losses(twin, rows, [24] * 3)
    assert not np.allclose(expected, everywhere, atol=1e-4)
    for steps in (True, False):
        found = continuation_loss(
            model, rows, [ScaleHeads({"L1H2": 5.0}, scope="prefill")], steps=steps
        )
        assert found.frame.edited.tolist() == pytest.approx(expected, abs=1e-4)
        whole = continuation_loss(model, rows, [ScaleHeads({"L1H2": 5.0})], steps=steps)
        # a head's gain at the prompt's last row acts on the first token predicted, so both
        # definitions count it
        assert whole.frame.edited.tolist() == pytest.approx(everywhere, abs=1e-4)
        assert whole.difference is not None
        changes = whole.frame.edited - whole.frame.baseline
        assert whole.difference.mean == pytest.approx(float(changes.mean()))


def test_the_sinks_of_act_come_from_the_prompt_alone(
    pocket: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_text(pocket.tokenizer, None, 40, 2, 3)
    seen: list[tuple[int, int]] = []
    find = ACT.sinks

    def spy(self: ACT, call: Any, look: Any) -> torch.Tensor:
        seen.append((call.n_queries, call.n_keys))
        return find(self, call, look)

    monkeypatch.setattr(ACT, "sinks", spy)
    found = continuation_loss(pocket, rows, [ACT()])
    assert seen and set(seen) == {(20, 20)}
    by_hand = []
    for row in rows:
        ids, losses = torch.tensor([row]), []
        with torch.no_grad():
            with pocket.edit(ACT()):
                out = pocket(input_ids=ids[:, :20], use_cache=True)
            for i in range(20, 40):
                losses.append(-torch.log_softmax(out.logits[0, -1], -1)[row[i]])
                out = pocket(
                    input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True
                )
        by_hand.append(float(torch.stack(losses).mean()))
    assert found.frame.edited.tolist() == pytest.approx(by_hand, abs=1e-4)
    assert not np.allclose(found.frame.edited, found.frame.baseline, atol=1e-4)


def test_loss_of_text_tasks_and_files(pocket: HookedModel, tmp_path: Path) -> None:
    prose = evaluate(pocket, metric="loss", n=2, context=64)
    facts = evaluate(pocket, "niah", metric="loss", n=2, context=64)
    (tmp_path / "t.txt").write_text(
        "The old king crossed the river near a tower slowly. " * 20, encoding="utf-8"
    )
    file = evaluate(pocket, metric="loss", n=2, context=64, text=tmp_path / "t.txt")
    assert [r.task for r in (prose, facts, file)] == ["prose", "niah", "text"]
    rows = rows_of_text(
        pocket.tokenizer, (tmp_path / "t.txt").read_text(encoding="utf-8"), 64, 2, 0
    )
    assert file.baseline == continuation_loss(pocket, rows).baseline
    assert all(r.frame.tokens.tolist() == [32, 32] for r in (prose, facts, file))


@pytest.mark.parametrize(
    ("texts", "how", "says"),
    [
        ([], {}, "at least one text"),
        ([[5]], {}, "no continuation"),
        ([[5, 6, 7]], dict(prompt_share=1.0), "between 0 and 1"),
        (
            [[5, 6, 7]],
            dict(edits=[ScaleHeads(GAINS, scope="decode")], steps=False),
            "token by token",
        ),
    ],
)
def test_texts_that_give_no_loss(
    worded: Any, texts: list[Any], how: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        continuation_loss(worded("llama")[0], texts, **how)


def test_edits_that_need_steps() -> None:
    assert not by_steps([ZeroTuning(2.0), ScaleHeads(GAINS)]) and not by_steps([])
    assert by_steps([ZeroTuning(2.0), ACT()]) and by_steps([ScaleHeads(GAINS, scope="decode")])
    assert by_steps([interp.edits.registry.get("paint")("initial")])  # type: ignore[call-arg]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("act.py", ["--n", "12"], "59.59 → 60.11"),
        ("zerotuning.py", ["--n", "12", "--gammas", "0.5"], "59.59 → 71.44"),
    ],
)
def test_examples_run(script: str, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and "McNemar" in done.stdout


def test_an_example_without_its_edits_fails_before_the_model_is_loaded() -> None:
    words = [
        sys.executable,
        str(ROOT / "examples/act.py"),
        "--model",
        "no-such-model",
        "--edit",
        "gone.json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "gone.json" in done.stderr
    )


def test_edit_table_measures_and_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    import edit_table
    import published

    monkeypatch.setattr(
        edit_table, "EDITS", [*edit_table.EDITS[:1], ("none such", "no_such_edit", {})]
    )
    result = edit_table.measure(4, 0, ["classification, 4 shots"])
    assert list(result["edits"]) == ["ZeroTuning γ = 2"]
    text = edit_table.render(json.loads(json.dumps(result)))
    assert "classification, 4 shots (n = 4)" in text and "| ZeroTuning γ = 2 | " in text
    page = f"a\n{edit_table.BEGIN}\nold\n{edit_table.END}\nb"
    page = published.put(page, text, edit_table.BEGIN, edit_table.END)
    assert (
        page.startswith(f"a\n{edit_table.BEGIN}\n| |")
        and page.endswith("\nb")
        and "old" not in page
    )
