"""Tasks of lm-evaluation-harness, offline: local YAML tasks on the bundled model; what is said
without the extra."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import interp
from interp.edits import ACT, ScaleHeads
from interp.errors import ContextError, InputError, MissingExtraError, UnknownNameError
from interp.evaluation import lm_eval as harness
from interp.evaluation.evaluate import evaluate
from interp_hooks import HookedModel


@pytest.fixture(scope="module")
def pocket() -> HookedModel:
    return interp.load("llama")


def test_without_the_harness_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, worded: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"interp\[lm-eval\]"):
        evaluate(worded("llama")[0], "lm_eval:sst2")
    from interp.cli.main import app

    done = CliRunner().invoke(app, ["evaluate", "--task", "lm_eval:sst2"])
    assert done.exit_code == 2 and "pip install" in done.output


@pytest.fixture(scope="module")
def local_tasks(pocket: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three YAML tasks over a local file of reviews: multiple choice, generation, perplexity."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    reader, task = interp.tasks.task.Text(pocket.tokenizer), interp.tasks.get("classification")
    rows = []
    for i in range(16):
        problem = task.compose(reader, np.random.default_rng([7, i]))
        label = ["positive", "negative"].index(problem.answer.strip())
        rows.append(
            json.dumps(dict(prompt=problem.clean, label=label, word=problem.answer.strip()))
        )
    (folder / "reviews.jsonl").write_text("\n".join(rows), encoding="utf-8")
    common = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{folder / 'reviews.jsonl'}\n"
        f"  cache_dir: {folder / 'cache'}\n"
        'test_split: test\ndoc_to_text: "{{prompt}}"\ntarget_delimiter: " "\n'
    )
    choice = (
        "task: local_reviews\noutput_type: multiple_choice\ndoc_to_target: label\n"
        'doc_to_choice: ["positive", "negative"]\nmetric_list:\n  - metric: acc\n'
    )
    words = (
        'task: local_words\noutput_type: generate_until\ndoc_to_target: "{{word}}"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 2\nmetric_list:\n  - metric: '
        "exact_match\n"
    )
    text = (
        'task: local_text\noutput_type: loglikelihood_rolling\ndoc_to_target: "{{prompt}}"\n'
        "metric_list:\n  - metric: word_perplexity\n"
    )
    for name, content in (("a", choice), ("b", words), ("c", text)):
        (folder / f"{name}.yaml").write_text(content + common, encoding="utf-8")
    return folder


def by_hand(model: HookedModel, folder: Path) -> list[float]:
    """Accuracy of the first six reviews, from a forward of our own each."""
    rows = [
        json.loads(line)
        for line in (folder / "reviews.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    ]
    words = [interp.tasks.task.Text(model.tokenizer).one(w) for w in ("positive", "negative")]
    found = []
    for row in rows:
        ids = torch.tensor([model.tokenizer.encode(row["prompt"])])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, -1, words]
        found.append(float(int(scores.argmax()) == row["label"]))
    return found


@pytest.mark.parametrize(
    "edits", [[], [ScaleHeads({"L0H0": -2.0, "L1H5": 4.0})], [ACT()]], ids=["none", "all", "act"]
)
def test_a_local_task_of_the_harness(
    pocket: HookedModel, local_tasks: Path, edits: list[Any]
) -> None:
    result = evaluate(pocket, "lm_eval:local_reviews", edits, limit=6, include_path=local_tasks)
    assert (
        result.metric == "acc" and result.task == "lm_eval:local_reviews" and result.baseline.n == 6
    )
    assert result.frame.baseline.tolist() == by_hand(pocket, local_tasks)
    assert result.provenance["versions"]["lm-eval"]
    if edits:
        with pocket.edit(*edits):
            assert result.frame.edited.tolist() == by_hand(pocket, local_tasks)
        assert result.mcnemar is not None and result.provenance["settings"][
            "edits"
        ] == interp.edits.to_json(edits)
    else:
        assert result.edited is None


def test_generation_in_the_harness(pocket: HookedModel, local_tasks: Path) -> None:
    result = evaluate(
        pocket,
        "lm_eval:local_words",
        [ScaleHeads(dict.fromkeys(pocket.heads, 0.0))],
        n=6,
        include_path=local_tasks,
    )
    assert result.metric == "exact_match"
    assert result.baseline.mean >= 0.5 and result.edited is not None and result.edited.mean == 0


def test_what_the_harness_refuses(pocket: HookedModel, local_tasks: Path, tapped: Any) -> None:
    with pytest.raises(InputError, match="perplexity"):
        evaluate(pocket, "lm_eval:local_text", include_path=local_tasks)
    with pytest.raises(InputError, match="no folder"):
        evaluate(pocket, "lm_eval:local_text", include_path=local_tasks / "gone")
    with pytest.raises(InputError, match=r"no number 'f1'.*it has acc"):
        evaluate(pocket, "lm_eval:local_reviews", n=2, metric="f1", include_path=local_tasks)
    with pytest.raises(InputError, match="without a tokenizer"):
        evaluate(tapped("llama")[0], "lm_eval:local_reviews", include_path=local_tasks)
    with pytest.raises(ContextError):
        evaluate(pocket, "lm_eval:local_reviews", context=4096, include_path=local_tasks)


def test_prompts_that_were_cut_are_noted(pocket: HookedModel, local_tasks: Path) -> None:
    result = evaluate(pocket, "lm_eval:local_reviews", n=2, context=40, include_path=local_tasks)
    assert any("lost their beginning" in note for note in result.notes)


def test_unknown_tasks_of_the_harness(pocket: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("lm_eval.tasks")

    class Names:
        all_tasks = ("sst2", "boolq")

        def __init__(self, **how: Any):
            pass

    monkeypatch.setattr(manager, "TaskManager", Names)
    with pytest.raises(UnknownNameError, match="did you mean sst2"):
        evaluate(pocket, "lm_eval:sst22")


def test_log_likelihoods_are_those_of_the_harness(pocket: HookedModel) -> None:
    """The harness's own model object, untouched, on answers of one and of several tokens."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    rng = np.random.default_rng(0)
    draw = lambda n: tuple(int(x) for x in rng.integers(10, 1000, n))  # noqa: E731
    prompts = [draw(n) for n in (5, 30, 12)]
    pairs = [(p, draw(n)) for p in prompts for n in (1, 1, 3)]
    lm = HFLM(pretrained=pocket.module, tokenizer=pocket.tokenizer, backend="causal", batch_size=4)
    theirs = lm._loglikelihood_tokens(
        [(("", ""), list(p), list(a)) for p, a in pairs], disable_tqdm=True
    )
    for stepwise in (False, True):
        ours = harness.log_likelihoods(pocket, pairs, stepwise)
        assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=1e-3)
        assert [b for _, b in ours] == [b for _, b in theirs]


TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}answer :"


@pytest.mark.slow
@pytest.mark.parametrize("turns", [None, False], ids=["turns", "one turn"])
@pytest.mark.parametrize("task", ["local_reviews", "local_words"])
def test_shots_and_chat_templates_are_the_harnesss_own(
    pocket: HookedModel, local_tasks: Path, task: str, turns: bool | None
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    pocket.tokenizer.chat_template = TEMPLATE
    try:
        lm = HFLM(
            pretrained=pocket.module, tokenizer=pocket.tokenizer, backend="causal", batch_size=4
        )
        theirs = simple_evaluate(
            lm,
            tasks=[task],
            task_manager=TaskManager(include_path=str(local_tasks), include_defaults=False),
            num_fewshot=2,
            apply_chat_template=True,
            fewshot_as_multiturn=turns is None,
            limit=6,
            fewshot_random_seed=0,
            bootstrap_iters=0,
        )
        ours = evaluate(
            pocket,
            f"lm_eval:{task}",
            n=6,
            include_path=local_tasks,
            num_fewshot=2,
            apply_chat_template=True,
            fewshot_as_multiturn=turns,
        )
    finally:
        pocket.tokenizer.chat_template = None
    rows = sorted(theirs["samples"][task], key=lambda row: row["doc_id"])
    assert ours.frame.baseline.tolist() == [float(row[ours.metric]) for row in rows]
    assert ours.provenance["settings"]["num_fewshot"] == 2
    assert all(row["arguments"][0][0].count("user :") > 1 for row in rows) == (turns is None)


def test_shots_that_can_not_be(pocket: HookedModel, local_tasks: Path) -> None:
    with pytest.raises(InputError, match="chat template"):
        evaluate(
            pocket, "lm_eval:local_reviews", include_path=local_tasks, apply_chat_template=True
        )
    with pytest.raises(InputError, match="can't be"):
        evaluate(pocket, "lm_eval:local_reviews", include_path=local_tasks, num_fewshot=-1)
    with pytest.raises(InputError, match="turns of a chat"):
        evaluate(pocket, "lm_eval:local_reviews", fewshot_as_multiturn=True)
    with pytest.raises(InputError, match="lm_eval:NAME"):
        evaluate(pocket, "induction", num_fewshot=2)
