"""`interp circuit`, with the bundled model: what it prints and saves, and one sentence for each
mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

import interp
from interp import circuits
from interp.circuits.circuit import Circuit
from interp.circuits.judging.agreement import Agreement
from interp.circuits.judging.curves import Faithfulness
from interp.circuits.known.truth import Truth, published_for, published_names
from interp.circuits.runs.paired_runs import PairedRuns
from interp.cli import circuit as command
from interp.cli.main import app
from interp.errors import InputError
from interp_hooks import Head, HookedModel

HEADS = {Head(2, 0): "name mover", Head(2, 1): "name mover", Head(0, 3): "duplicate token"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pocket: HookedModel) -> list[Any]:
    """The working folder is an empty one, and the model is loaded once; what was asked of `load` is
    kept."""
    seen: list[Any] = []

    def load(source: Any, **how: Any) -> HookedModel:
        seen.append((source, how))
        return pocket

    monkeypatch.setitem(vars(interp), "load", load)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return seen


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["circuit", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def wrong(*arguments: object) -> str:
    """The one sentence of a mistake."""
    result = run(*arguments, code=2)
    assert not result.stdout
    said = [line for line in result.stderr.splitlines() if "bundled" not in line]
    assert len(said) == 1 and said[0].startswith("Error: "), result.stderr
    return said[0]


def truth_file(path: Path = Path("truth.json"), **changes: Any) -> Path:
    made: dict[str, Any] = dict(name="ioi", heads=HEADS, n_layers=4, n_heads=8, source="made up")
    return Truth(**{**made, **changes}).save(path)


# Starting


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pandas', 'plotly', 'numpy', 'pyarrow', 'sae_lens'}"
    code = (
        "import sys; from interp.cli.main import app\n"
        "try: app(['circuit', '--help'])\n"
        f"except SystemExit: print('LOADED', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--faithfulness" in done.stdout and "LOADED []" in done.stdout


def test_the_help_names_every_method() -> None:
    shown = " ".join(run("--help").output.replace("│", " ").split())
    for name in circuits.names():
        summary = circuits.registry.summary(name)  # read from the source, without torch
        assert summary == circuits.registry.get(name).summary
        assert f"{name}: {summary}." in shown


# What it gives


def test_a_circuit_is_printed_saved_and_loads_again(here: list[Any], pocket: HookedModel) -> None:
    result = run("--method", "head_ablation", "--n", 8, "--seed", 3, "--device", "cpu", "--top", 4)
    assert here == [("llama", {"device": "cpu", "dtype": None, "backend": "auto"})]
    folder = Path("interp-circuits") / "pocket-llama-ioi-head_ablation"
    names = {"atlas.json", "atlas.parquet", "circuit.json", "edges.parquet", "report.html"}
    assert {p.name for p in folder.iterdir()} == names
    saved = Circuit.load(folder)
    again = circuits.find(pocket, "ioi", "head_ablation", n=8, seed=3)
    pd.testing.assert_frame_equal(saved.frame, again.frame)
    rows = [
        line.split()
        for line in result.stdout.splitlines()
        if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])
    ]
    assert [row[1] for row in rows] == [str(h) for h in again.heads(4)]
    first = again.frame.loc[again.frame.head_ablation.idxmax()]
    low, high = first.head_ablation_effect_low, first.head_ablation_effect_high
    assert f"{first.head_ablation:.3f}" in result.stdout
    assert f"{first.head_ablation_effect:+.3g} [{low:.3f}, {high:.3f}]" in result.stdout
    assert "pocket-llama, ioi by head_ablation, 8 pairs, accuracy 1.000" in result.stdout
    assert str(folder / "report.html") in result.stdout
    assert f"{again.search.forwards:.1f} forward passes" in result.stderr
    assert "100% Head ablation" in result.stderr
    assert "Circuit for ioi in pocket-llama" in (folder / "report.html").read_text(encoding="utf-8")


def test_show_reads_it(tmp_path: Path) -> None:
    run("--method", "head_ablation", "--n", 4, "--task", "induction", "--out", "found")
    shown = CliRunner().invoke(app, ["show", "found", "--score", "head_ablation", "--top", "3"])
    assert shown.exit_code == 0, shown.output
    assert all(str(h) in shown.stdout for h in Circuit.load("found").heads(3))
    assert CliRunner().invoke(app, ["show", "found"]).exit_code == 0


def test_discrete_sae_keeps_its_autoencoder() -> None:
    result = run(
        "--method",
        "discrete_sae",
        "--n",
        8,
        "--set",
        "steps=5",
        "--set",
        "trials=2",
        "--set",
        "standardise=no",
        "--set",
        "rate=1e-3",
    )
    folder = Path("interp-circuits") / "pocket-llama-ioi-discrete_sae"
    settings = Circuit.load(folder).provenance["settings"]
    asked = {"steps": 5, "trials": 2, "standardise": False, "rate": 1e-3}
    assert {name: settings[f"discrete_sae.{name}"] for name in asked} == asked
    assert (folder / "sae").is_dir() and str(folder / "sae") in result.stdout


@pytest.mark.slow
def test_presets_and_settings_on_top() -> None:
    run("--method", "head_ablation", "--preset", "zero", "--n", 4, "--out", "a")
    assert Circuit.load("a").provenance["settings"]["head_ablation.mode"] == "zero"
    run(
        "--method",
        "head_ablation",
        "--preset",
        "zero",
        "--set",
        "mode=resample",
        "--n",
        4,
        "--out",
        "b",
    )
    assert Circuit.load("b").provenance["settings"]["head_ablation.mode"] == "resample"
    run(
        "--method",
        "path_patching",
        "--set",
        "receivers=L2H0.q,L2H1.q",
        "--set",
        "senders=0.3, 0.7",
        "--n",
        4,
        "--out",
        "c",
    )
    found = Circuit.load("c")
    assert set(found.edges.sender) == {"L0H3", "L0H7"} and set(found.edges.receiver) == {
        "L2H0",
        "L2H1",
    }
    run(
        "--method",
        "path_patching",
        "--set",
        "senders=none",
        "--set",
        "freeze_mlps=true",
        "--n",
        4,
        "--out",
        "d",
    )
    assert len(Circuit.load("d").edges) == 32


# A known circuit


def test_it_is_compared_with_a_file(pocket: HookedModel) -> None:
    result = run("--method", "eap", "--n", 8, "--compare", truth_file(), "--out", "found")
    agreement = circuits.evaluate(Circuit.load("found"), Truth.load("truth.json"))
    saved = json.loads(Path("found/agreement.json").read_text(encoding="utf-8"))
    assert asdict(Agreement.load("found")) == {
        **saved,
        "notes": tuple(saved["notes"]),
        **{k: {int(n): v for n, v in saved[k].items()} for k in ("precision", "recall")},
    }
    assert saved["auc"] == agreement.auc and saved["n_positive"] == 3 and saved["truth"] == "ioi"
    assert saved["precision"] == {str(k): v for k, v in agreement.precision.items()}
    for said in (
        f"{agreement.auc:.3f}",
        f"{agreement.auc_pessimistic:.3f}",
        f"{agreement.average_precision:.3f}",
    ):
        assert said in result.stdout
    lines = {line.split()[1]: line.rstrip() for line in result.stdout.splitlines() if " L" in line}
    assert lines["L2H0"].endswith("name mover") and lines["L0H3"].endswith("duplicate token")
    assert lines["L3H3"].endswith("–")
    assert "Against the known circuit ioi" in Path("found/report.html").read_text(encoding="utf-8")


def test_lists_of_the_strongest_heads_give_precision_only() -> None:
    result = run(
        "--method", "eap", "--n", 8, "--compare", truth_file(complete=False), "--out", "found"
    )
    assert (
        "precision at least 1.00 at 1" in result.stdout
        and not Path("found/agreement.json").exists()
    )


def test_the_model_s_own_names_find_the_published_circuit() -> None:
    for name in ("gpt2", "openai-community/gpt2", "/models/GPT2"):
        assert published_for("ioi", name).model == "gpt2"
    assert command.known("published", "gpt2", "greater_than", False).name == "greater_than"  # type: ignore[union-attr]
    assert command.known("published", "openai-community/gpt2", "ioi", False).model == "gpt2"  # type: ignore[union-attr]
    if ("ioi", "pocket-llama") in published_names():
        assert command.known("published", "llama", "ioi", False).n_heads == 8  # type: ignore[union-attr]
    with pytest.raises(
        InputError, match=r"No circuit of ioi is known for pythia-70m; one is for gpt2"
    ):
        command.known("published", "pythia-70m", "ioi", False)
    with pytest.raises(
        InputError, match=r"No circuit of bigram is known for gpt2; there are ioi \(gpt2\)"
    ):
        published_for("bigram", "gpt2")


def test_a_folder_s_model_is_looked_up_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    # the name is known when the model is loaded
    assert command.known("published", str(tmp_path / "saved"), "ioi", False) is None


def test_the_command_for_gpt2_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any
) -> None:
    """With stand-in weights of GPT-2 small's 12 × 12 heads, narrow and random, in the place of the
    hub's."""
    import transformers

    from interp.loading import load
    from interp.models.names import ALIASES

    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=48, n_layer=12, n_head=12, n_positions=64, vocab_size=len(tokenizer)
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setitem(ALIASES, "gpt2", str(folder))
    monkeypatch.setitem(vars(interp), "load", load)
    asked = "--model gpt2 --task ioi --method discrete_sae --compare published".split()
    said = run(*asked, "--force", "--n", 6, "--set", "trials=2", "--set", "steps=20")
    assert "Known circuit: Wang et al. 2022" in said.output and "26 of 144" in said.output
    found = Circuit.load(
        Path("interp-circuits") / next(p.name for p in Path("interp-circuits").iterdir())
    )
    assert len(found.frame) == 144
    # random weights can't do the task, and that is told where it isn't forced
    assert "--force" in wrong(*asked, "--n", 48)


# Faithfulness


def test_faithfulness_is_measured_and_saved() -> None:
    result = run("--method", "attribution", "--n", 8, "--faithfulness", "--out", "found")
    curve = pd.read_parquet("found/faithfulness.parquet")
    again = Faithfulness.load("found")
    pd.testing.assert_frame_equal(again.frame, curve)
    assert again.provenance["model"] and again.full.low <= again.full.mean <= again.full.high
    assert curve.k.iloc[0] == 0 and curve.k.iloc[-1] == 32
    assert {"faithfulness", "completeness", "random"} <= set(curve.columns)
    assert "CPR" in result.stdout and "CMD" in result.stdout
    assert f"{curve.faithfulness.iloc[2]:.3f}" in result.stdout
    assert 'id="faithfulness"' in Path("found/report.html").read_text(encoding="utf-8")


# Prompts of one's own


def prompt_file(pocket: HookedModel, path: Path = Path("prompts.json"), **changes: Any) -> Path:
    """The task's own prompts as someone would write them."""
    rows = []
    for i in circuits.prompts.from_task(pocket, "ioi", 6).instances:
        text = [
            pocket.tokenizer.decode(ids, skip_special_tokens=True) for ids in (i.ids, i.corrupted)
        ]
        answer, other = (pocket.tokenizer.decode([ids[0][0]]) for ids in (i.accept, i.wrong))
        rows.append({"clean": text[0], "corrupted": text[1], "answer": answer, "wrong": other})
    rows[1] |= changes
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_prompts_of_one_s_own(pocket: HookedModel) -> None:
    run("--method", "attribution", "--prompts", prompt_file(pocket), "--compare", truth_file())
    found = Circuit.load("interp-circuits/pocket-llama-prompts-attribution")
    assert found.search.n == 6
    # as from the task, whose prompts these are
    task = circuits.find(pocket, "ioi", "attribution", n=6)
    np.testing.assert_allclose(
        found.frame.attribution, task.frame.attribution, rtol=1e-4, atol=1e-5
    )
    assert found.search.clean.mean == pytest.approx(task.search.clean.mean, rel=1e-5)


# Mistakes


def test_mistakes_are_told_before_the_model_is_loaded(here: list[Any], pocket: HookedModel) -> None:
    prompts = prompt_file(pocket)
    Path("file").write_text("")
    Path("broken.json").write_text("[{")
    sae = ("--method", "discrete_sae")
    cases: list[tuple[list[object], str]] = [
        (["--method", "discrete_saes"], "did you mean discrete_sae"),
        (["--task", "ioii"], "did you mean ioi"),
        (["--method", "eap", "--preset", "paper"], "has no preset 'paper'; it has none"),
        (
            ["--method", "eap", "--set", "mode=zero"],
            "mode is not a setting of the method eap; it takes none",
        ),
        (["--method", "head_ablation", "--set", "modes=zero"], "it takes mode"),
        (["--method", "head_ablation", "--set", "mode"], "--set takes NAME=VALUE"),
        (["--method", "head_ablation", "--set", "mode=gone"], "zero, mean, resample"),
        ([*sae, "--set", "steps=many"], "steps of discrete_sae is a whole number, not 'many'"),
        ([*sae, "--set", "rate=fast"], "rate of discrete_sae is a number, not 'fast'"),
        ([*sae, "--set", "standardise=perhaps"], "is true or false, not 'perhaps'"),
        ([*sae, "--set", "steps=0"], "from 1 on"),
        (["--method", "acdc", "--set", "thresholds=0.1,x"], "thresholds of acdc is numbers"),
        (["--out", "file"], "is a file, not a folder"),
        (["--prompts", "gone.json"], "gone.json can't be read (no such file"),
        (["--prompts", "broken.json"], "is not JSON"),
        (["--prompts", prompts, "--task", "ioi"], "leave --task or --prompts out"),
        (["--prompts", prompts, "--faithfulness"], "leave --faithfulness out"),
        (
            ["--prompts", prompts, "--compare", "published"],
            "No circuit is known for prompts of one's own",
        ),
        (["--compare", "gone.json"], "There is no circuit file gone.json"),
        (["--compare", "broken.json"], "broken.json is damaged"),
        (["--compare", prompts], "is not a circuit of format 1"),
        (
            ["--compare", "published", "--task", "colored_objects", "--model", "opt-125m"],
            "is known for opt-125m",
        ),
    ]
    for arguments, said in cases:
        assert said in wrong(*arguments), arguments
    assert not here
    assert not Path("interp-circuits").exists()
    run("--n", 1, code=2)
    run("--top", 0, code=2)
    run("--seed", -1, code=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"corrupted": "The"}, "patching needs pairs of one length"),
        ({"corrupted": None}, "Prompt 2 has no negative example"),
        ({"answer": " in the"}, "must be one"),
    ],
)
def test_mistakes_in_prompts(pocket: HookedModel, changes: dict[str, Any], said: str) -> None:
    assert said in wrong("--method", "attribution", "--prompts", prompt_file(pocket, **changes))


def test_a_known_circuit_of_another_shape(here: list[Any]) -> None:
    assert "compare the same model" in wrong(
        "--method", "eap", "--compare", truth_file(n_layers=12, n_heads=12)
    )


def test_a_model_that_cannot_do_the_task(monkeypatch: pytest.MonkeyPatch, worded: Any) -> None:
    prompts = circuits.prompts.from_task(model := worded("llama")[0], "ioi", 8)
    monkeypatch.setitem(vars(interp), "load", lambda source, **how: model)
    margins = PairedRuns(model, prompts).margins()
    rows = []
    for i, margin in zip(prompts.instances, margins, strict=True):
        good, bad = (model.tokenizer.decode([ids[0][0]]) for ids in (i.accept, i.wrong))
        text = [
            model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (i.ids, i.corrupted)
        ]
        answer, other = (good, bad) if margin < 0 else (bad, good)  # what the model does not prefer
        rows.append({"clean": text[0], "corrupted": text[1], "answer": answer, "wrong": other})
    Path("prompts.json").write_text(json.dumps(rows))
    arguments = ("--method", "attribution", "--prompts", "prompts.json", "--out", "found")
    assert "can't do prompts" in wrong_after_progress(*arguments)
    assert not Path("found").exists()
    assert "read with care" in run(*arguments, "--force").stdout
    assert Circuit.load("found").search.clean.mean < 0


def wrong_after_progress(*arguments: object) -> str:
    result = run(*arguments, code=2)
    return result.stderr.strip().splitlines()[-1]
