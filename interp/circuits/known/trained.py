"""Models trained to keep a program's variables in chosen nodes, after InterpBench.

`examples/train_siit.py` trains them and puts them where `names` finds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from interp.circuits.known.drawn import ProgramTask
from interp.circuits.known.high_level import PROGRAMS, Program
from interp.models.names import FOLDER


@dataclass(frozen=True)
class SiitIndirectObject(ProgramTask):
    """ "<bos> Ann and Bob … Bob … to" → Ann, of the model trained for it."""

    name = "siit_ioi"
    program: ClassVar[Program] = PROGRAMS[name]
    summary = program.summary
    words: ClassVar[tuple[str, ...]] = program.words
    citation: ClassVar[str] = "Gupta et al. 2024, arXiv 2407.14494"


@dataclass(frozen=True)
class SiitPointer(ProgramTask):
    """ "<bos> i j t0 t1 t2 t3 t4 =" → t at (i + j) mod 5, of the model trained for it."""

    name = "siit_pointer"
    program: ClassVar[Program] = PROGRAMS[name]
    summary = program.summary
    words: ClassVar[tuple[str, ...]] = program.words
    citation: ClassVar[str] = "Gupta et al. 2024, arXiv 2407.14494"


@dataclass(frozen=True)
class SiitInduction(ProgramTask):
    """Eight letters, one of them again → the letter that followed it, of the model trained for
    it."""

    name = "siit_induction"
    program: ClassVar[Program] = PROGRAMS[name]
    summary = program.summary
    words: ClassVar[tuple[str, ...]] = program.words
    citation: ClassVar[str] = "Gupta et al. 2024, arXiv 2407.14494"


TASKS: dict[str, ProgramTask] = {
    t.name: t for t in (SiitIndirectObject(), SiitPointer(), SiitInduction())
}


def names() -> list[str]:
    """Those that are here, trained."""
    return [name for name in TASKS if (folder_of(name) / "training.json").is_file()]


def module_of(name: str) -> Any:
    """The trained GPT-2, read from its folder."""
    import transformers as hf

    hf.utils.logging.disable_progress_bar()
    return hf.GPT2LMHeadModel.from_pretrained(folder_of(name)).eval()


def reached(name: str) -> dict[str, Any]:
    """What training reached on held-out prompts: accuracy, interchange accuracies, the most that
    nodes outside the circuit change a probability."""
    text = (folder_of(name) / "training.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["reached"]
    return found


def folder_of(name: str) -> Any:
    """Where the model lies."""
    return FOLDER / name
