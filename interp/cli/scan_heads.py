"""`interp scan-heads`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from interp.cli import as_json as documents
from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import (
    AddressOption,
    BackendOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    FormatOption,
    ModelOption,
    OverwriteOption,
    QuantizationOption,
    RevisionOption,
    SeedOption,
    WorkersOption,
    listing,
    note,
    out,
)
from interp.scores import catalogue as scores
from interp.support.progress import before, duration, progress

if TYPE_CHECKING:
    from interp.atlas import Atlas

#: a plan that takes longer than this is asked about
ASK_FROM_SECONDS = 600
FOLDER = Path("interp-scans")


def scan_heads(
    model: ModelOption = "llama",
    scores: Annotated[
        str,
        typer.Option(
            help="default, all, or names, like sink,retrieval; -name takes one out, like "
            f"all,-importance. There are {listing(scores)}."
        ),
    ] = "default",
    context: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Length of the inputs in tokens.",
            show_default="1024, or the model's limit",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="How many inputs a score is averaged over.")
    ] = 16,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the atlas and the report.", show_default="interp-scans/MODEL"
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="A text, or a text file (UTF-8), to measure on instead of the English shipped.",
            metavar="TEXT|FILE",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures for the image scores, instead of rendered scenes."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to ask about each picture.", show_default="describe the picture :"),
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            help="Words, like table,chair: where the heads look when each comes, in up to four "
            "pictures."
        ),
    ] = None,
    format: FormatOption = None,
    haystack: Annotated[
        str | None,
        typer.Option(
            help="A text, or a text file (UTF-8), to hide needles in instead of the English "
            "shipped.",
            metavar="TEXT|FILE",
        ),
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(help='A fact of your own to hide: "The … is …", or "lead | answer".'),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="What asks for that fact.", show_default="made of the needle"),
    ] = None,
    force: ForceOption = False,
    overwrite: OverwriteOption = False,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Allow a context past the model's limit.")
    ] = False,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=16,
            help="Read texts so many tokens at a time over a cache: long ones in less memory.",
            show_default="all at once",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    address: AddressOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Don't ask before a long scan or a download.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print an object as JSON: the strongest heads of each score, and the folder.",
        ),
    ] = False,
) -> None:
    """Score every attention head: sinks, retrieval, induction, …

    Prints a plan, then the top heads of every score; saves an atlas, and a report that opens in a
    browser.

    An interrupted scan resumes when the same command runs again. Exit code 3: some scores are
    missing because memory ran out; the same command measures these alone.
    """
    # What can go wrong without the model goes wrong before it is loaded.
    from interp import scores as registered
    from interp.inputs.text import content, file_of
    from interp.support.files import check_writable, folder_name

    check_writable(target or FOLDER)
    registered.select(scores)
    shared = common.workers(workers, address)
    texts: dict[str, Any] = dict(text=text, haystack=haystack)
    for what, given in texts.items():
        if given is not None:
            content(given, what)
            texts[what] = file_of(given, what) or given
    if images is not None:
        from interp.vision.pictures import files_in

        files_in(images)
    if words is not None:
        from interp.vision.words import chosen

        chosen(words)
    import interp
    from interp.atlas import REPORT_SECONDS
    from interp.support.ownership import owned

    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        yes,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    plan = interp.plan_scan(
        loaded,
        scores=scores,
        context=context,
        samples=samples,
        seed=seed,
        **texts,
        extrapolate=extrapolate,
        images=images,
        prompt=prompt,
        format=format,
        needle=needle,
        question=question,
        force=force,
        words=words,
        chunk=chunk,
    )
    show_plan(plan, loaded.name)
    note(of_pictures(plan, images))
    if plan.seconds > ASK_FROM_SECONDS and not yes:
        agree(plan.seconds)
    folder = target
    if folder is None:
        usual = FOLDER / folder_name(loaded.name)
        folder = plan.folder(usual)
        if folder != usual:
            note(f"{usual} holds another scan, so this one goes into {folder}.")
    with shared as cluster, owned(folder), progress("Scanning") as report:
        # saves the atlas too; the bar is full when the report is written
        share = REPORT_SECONDS / max(plan.seconds, REPORT_SECONDS + 1)
        run = plan.run if cluster is None else partial(cluster.run, plan)
        atlas = run(folder, before(report, share), overwrite)
        report(99, 100, "report")
        page = atlas.report(folder / "report.html")
        report(100, 100, "done")
    if as_json:
        emit(documents.atlas(atlas, folder=str(folder), report=str(page)))
    else:
        show(atlas, folder, page)
    if atlas.provenance.get("missing"):
        raise typer.Exit(common.INCOMPLETE)


def show(atlas: Atlas, folder: Path, page: Path) -> None:
    """The strongest heads of every score, what to mind, and where everything is."""
    from interp.report.card import cards, opening

    console = out()
    console.print(common.about_line(atlas), soft_wrap=True)
    console.print(common.top_table(atlas, console.width))
    massive = common.massive_line(atlas)
    if massive is not None:
        console.print(massive, soft_wrap=True)
    for remark in atlas.notes:
        console.print(Text(remark, style="yellow"), soft_wrap=True)
    console.print(Text.assemble(("Atlas   ", "dim"), str(folder)), soft_wrap=True)
    console.print(Text.assemble(("Report  ", "dim"), str(page)), soft_wrap=True)
    best = None if atlas.evidence is None else opening(cards(atlas, atlas.evidence))
    if best is not None:
        note(
            f"What one head does ({best[1]}), and where in the texts: interp show {folder} --head "
            f"{best[0]}"
        )


def show_plan(plan: Any, name: str) -> None:
    """What will be measured, how, and what it costs; on stderr, for it is not a result."""
    size = "tokens × samples"
    table = common.table("probe", "measured", size, right=(size,), title=f"Plan for {name}")
    for probe, measured, passes in plan.rows:
        table.add_row(Text(probe, style="bold"), Text(measured), Text(str(passes)))
    common.err().print(table)
    note(plan.cost + ".")


def of_pictures(plan: Any, images: Path | None) -> str | None:
    """How to leave the text out, where pictures were given and texts are read too."""
    if images is None or not any(not s.needs_images for s in plan.scores):
        return None
    names = ",".join(s.name for s in plan.scores if s.needs_images)
    return f"Texts and needles are read too; for the pictures alone: --scores {names}"


def agree(seconds: float) -> None:
    """Ask before a long scan. Raises `InputError` where nobody can be asked, exits with 1 on a
    no."""
    from interp.errors import InputError

    if not common.is_interactive():
        raise InputError(
            f"This scan takes about {duration(seconds)}; add --yes to run it without being "
            "asked, or choose "
            "fewer --samples, a shorter --context or fewer --scores."
        )
    if not typer.confirm("Run it?", err=True):
        note("Nothing was run.")
        raise typer.Exit(1)
