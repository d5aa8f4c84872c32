"""The command line: every command with options and values of every kind, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tiny
import typer
from hypothesis import strategies as st
from typer.testing import CliRunner

import interp
from interp.cli import main
from interp_hooks import hook

from ..nasty import TEXTS, texts
from ..target import Target
from .score_files import GATES, LISTS

#: what each command is given first, so that it has little to do; later options come after these
FIRST = {
    "scan-heads": ["--model", "llama", "--context", "32", "--samples", "1", "--scores", "sink"],
    "show": ["scan"],
    "compare": ["scan", "scan"],
    "ablate": ["--model", "llama", "--heads", "0.1", "--task", "ioi", "--n", "2", "--force"],
    "evaluate": ["--model", "llama", "--task", "ioi", "--n", "2", "--force"],
    "calibrate": [
        "--model",
        "llama",
        "--method",
        "zerotuning",
        "--task",
        "ioi",
        "--n",
        "8",
        "--force",
    ],
    "circuit": ["--model", "llama", "--task", "ioi", "--method", "eap", "--n", "2", "--force"],
    "generate": ["--model", "llama", "--prompt", "the cat", "--max-new-tokens", "2"],
    "list": ["scores"],
    "models": [],
}
PLACES = (
    "scan scores.json gates.tsv edit.json prompts.jsonl task.jsonl folder gone bytes.bin llama "
    "file.gguf /dev/null folder/none/deep scan/atlas.json"
).split()
WORDS = [
    "sink",
    "retrieval",
    "ioi",
    "niah",
    "copy",
    "eap",
    "act",
    "zero",
    "0.1",
    "L0H0,L1H1",
    "all",
]
NUMBERS = ["0", "1", "2", "-1", "3.5", "nan", "inf", "1e9", "9" * 25, "٣", "0x1", "8"]


class CommandLine(Target):
    """`interp COMMAND …` in this process: exit codes 0, 1, 2 and 130, and no exception."""

    name = "cli"
    limit = 30.0

    def prepare(self) -> None:
        from train_pocket_llama import build_tokenizer

        tokenizer = build_tokenizer()
        self.model = hook(tiny.build("llama", len(tokenizer)), name="tiny", tokenizer=tokenizer)
        scan = dict(context=32, samples=2, progress=False)
        interp.scan_heads(self.model, ["sink", "entropy"], **scan).save(self.folder / "scan")
        for name, content in {
            "scores.json": json.dumps(LISTS),
            "gates.tsv": GATES,
            "edit.json": '{"edit": "scale_heads", "gains": {"L0H1": 0.5}}',
            "prompts.jsonl": '{"clean": "a cat", "corrupted": "a dog", "answer": " the"}',
            "task.jsonl": '{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}',
            "file.gguf": "GGUF",
        }.items():
            (self.folder / name).write_text(content)
        (self.folder / "bytes.bin").write_bytes(b"\xff\xfe\x00")
        (self.folder / "folder").mkdir()
        group = typer.main.get_command(main.app)
        self.commands = {
            name: [
                (option, parameter)
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
                if option.startswith("-") and option not in ("--help", "--yes", "-y")
            ]
            for name, command in group.commands.items()  # type: ignore[attr-defined]
            if name in FIRST
        }

    def inputs(self) -> st.SearchStrategy[Any]:
        values = st.one_of(
            st.sampled_from(PLACES),
            st.sampled_from(WORDS),
            st.sampled_from(NUMBERS),
            st.sampled_from(TEXTS),
            texts,
        )

        @st.composite
        def lines(draw: st.DrawFn) -> list[str]:
            name = draw(st.sampled_from(sorted(self.commands)))
            line = [name, *FIRST[name]] if draw(st.integers(0, 5)) else [name]
            for option, parameter in draw(
                st.lists(st.sampled_from(self.commands[name] or [("--help", None)]), max_size=3)
            ):
                line.append(option)
                if not getattr(parameter, "is_flag", False):
                    line.append(draw(values))
            line += draw(st.lists(values, max_size=1))
            if draw(st.integers(0, 19)) == 0:
                return [draw(texts), *line]
            return line

        return lines()

    def run(self, value: Any) -> str:
        os.chdir(self.folder)
        real = interp.load

        def load(model: Any, *args: Any, **kwargs: Any) -> Any:
            here = isinstance(model, str | Path) and Path(os.fsdecode(model)).suffix == ".gguf"
            known = model in ("llama", "pocket-llama", "llava", "smollm2", "smollm2-135m")
            if not known and (here or not str(model).isprintable() or len(str(model)) > 100):
                return real(model, *args, **kwargs)
            return self.model

        interp.load = load  # type: ignore[assignment]
        try:
            done = CliRunner().invoke(main.app, value, env={"COLUMNS": "100"})
        finally:
            interp.load = real  # type: ignore[assignment]
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code in (0, 1, 2, 130), done.exit_code
        return f"exit {done.exit_code}"

    def refused(self, error: BaseException) -> bool:
        return False  # the command line prints a refusal and exits with 2
