"""`python -m tests.fuzz --inputs 20000 --out FOLDER`; exit code 1 where there was a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

for folder in ("tests", "examples"):  # the models that tests build
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRITON_INTERPRET", "1")

from .run import run_all  # noqa: E402
from .targets import TARGETS  # noqa: E402

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("--inputs", type=int, default=20_000, help="in all, or of each target named")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, help="folder for a JSON file of counts and faults a target")
parser.add_argument("--target", action="append", choices=list(TARGETS))
asked = parser.parse_args()
sys.exit(1 if run_all(asked.inputs, asked.seed, asked.out, asked.target) else 0)
