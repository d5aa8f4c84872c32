"""`python -m interp_hooks.conformance`: the table of architectures."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from interp_hooks.conformance.building import KINDS, classes
from interp_hooks.conformance.sweep import Row, sweep
from interp_hooks.conformance.table import write


def main() -> None:
    """Examines what is asked for, prints a line each, writes JSON and, of a whole sweep, the
    page."""
    parser = argparse.ArgumentParser(prog="interp_hooks.conformance", description=__doc__)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--model", action="append", help="a model type, such as llama; repeatable")
    parser.add_argument("--json", type=Path, help="where the rows go; those of a file there stay")
    parser.add_argument("--page", type=Path, help="a Markdown page of the JSON's rows")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    wanted = [
        (kind, name)
        for kind in kinds
        for name in classes(kind)
        if not options.model or name in options.model
    ]
    if not wanted:
        sys.exit(f"No architecture of this transformers is called {', '.join(options.model)}.")
    known: dict[tuple[str, str], Row] = {}
    if options.json is not None and options.json.exists():
        for row in json.loads(options.json.read_text())["rows"]:
            known[row["kind"], row["model_type"]] = Row(**row)

    def told(row: Row) -> None:
        print(f"{row.kind:8} {row.model_type:28} {row.status:12} {row.reason}"[:240], flush=True)
        known[row.kind, row.model_type] = row
        if options.json is not None:
            write_json(options.json, list(known.values()))

    rows = sweep(wanted, told, options.jobs)
    counts = Counter((row.kind, row.status) for row in rows)
    for (kind, status), n in sorted(counts.items()):
        print(f"{kind:8} {status:12} {n}")
    if options.page is not None:
        write(options.page, list(known.values()), about())
    if any(row.status in ("wrong", "error") for row in rows):
        sys.exit(1)


def about() -> dict[str, str]:
    """What the rows were taken with, and when."""
    import platform
    from datetime import date

    import torch
    import transformers

    return dict(
        transformers=transformers.__version__,
        torch=torch.__version__,
        machine=platform.machine(),
        date=date.today().isoformat(),
    )


def write_json(path: Path, rows: list[Row]) -> None:
    """The rows with the versions they were taken with."""
    ordered = sorted(rows, key=lambda row: (list(KINDS).index(row.kind), row.model_type))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(about=about(), rows=[asdict(r) for r in ordered]), indent=1))


if __name__ == "__main__":
    main()
