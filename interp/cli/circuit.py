"""`interp circuit`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from interp.circuits.methods import catalogue as methods
from interp.cli import as_json as documents
from interp.cli import common
from interp.cli.as_json import emit, records
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
    explained,
    listing,
    note,
    out,
)
from interp.support.progress import progress
from interp.tasks import catalogue as tasks

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit
    from interp.circuits.judging.agreement import Agreement
    from interp.circuits.judging.curves import Faithfulness
    from interp.circuits.known.truth import Truth

FOLDER = Path("interp-circuits")
#: the word for `--compare` that is no file
PUBLISHED = "published"


def circuit(
    model: ModelOption = "llama",
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Task to explain: {listing(tasks)}, or a file of one's own.", show_default="ioi"
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help=f"How. {explained(methods)} Or a function of one's own: FILE.py:function.",
            metavar="NAME|FILE.py:FN",
        ),
    ] = "eap",
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for the circuit.",
            show_default="interp-circuits/MODEL-TASK-METHOD",
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", min=2, help="Pairs of prompts, clean and corrupted.")
    ] = 128,
    preset: Annotated[
        str | None, typer.Option(help="Settings of the method by name, like paper.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the method; may be repeated.", metavar="NAME=VALUE"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts of one's own instead of a task: clean, corrupted, answer, wrong.",
            metavar="FILE",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Judge the ranking by a known circuit: published, or a file.",
            metavar="published|FILE",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to print.")] = 10,
    faithfulness: Annotated[
        bool,
        typer.Option(
            "--faithfulness",
            help="Also measure how far the heads do the task alone, on other prompts.",
        ),
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Also write the circuit as a JSON graph of EAP-IG and MIB.", metavar="FILE"
        ),
    ] = None,
    format: FormatOption = None,
    force: ForceOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    device_map: DeviceMapOption = None,
    quantization: QuantizationOption = None,
    revision: RevisionOption = None,
    backend: BackendOption = "auto",
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    address: AddressOption = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print an object as JSON: the strongest heads, the edges, and where it was saved.",
        ),
    ] = False,
) -> None:
    """Find which heads do a task, and how surely; saves the table, its edges and a report that
    opens in a browser."""
    # What can go wrong without the model goes wrong before it is loaded.
    from interp.circuits.known.truth import published_for
    from interp.support.files import check_writable, folder_name

    check_writable(target or FOLDER)
    if export is not None:
        check_writable(export.parent)
    searcher = made(method, preset, settings or [])
    shared = common.workers(workers, address, searcher)
    rows = written(prompts, task, faithfulness)
    truth = known(compare, model, task or "ioi", rows is not None)
    from interp import circuits
    from interp.circuits.finding import pose
    from interp.results.head_table_files import HEAD
    from interp.support.finished import check_replaceable, vacant
    from interp.support.ownership import owned

    loaded = common.load(
        model,
        device,
        dtype,
        backend,
        device_map=device_map,
        quantization=quantization,
        revision=revision,
    )
    if compare == PUBLISHED and truth is None:
        truth = published_for(task or "ioi", loaded.name)
    if truth is not None:
        truth.check_model(loaded)
    problems: Any = task or "ioi"
    if rows is not None:
        problems = circuits.prompts.from_texts(loaded, rows)
    search = pose(loaded, problems, searcher, n, seed, format=format)
    folder = target or vacant(
        FOLDER
        / folder_name(
            loaded.name,
            prompts.stem if prompts else problems,
            *filter(None, (searcher.name, preset)),
        ),
        HEAD,
        search.record,
    )
    with shared as cluster, owned(folder):
        check_replaceable(folder / HEAD, search.record, overwrite)
        find: Any = circuits.find if cluster is None else cluster.circuit
        with progress(f"Finding the circuit by {method}") as report:
            result = find(
                loaded,
                search.prompts,
                searcher,
                n,
                seed,
                force=force,
                progress=report,
                resume=folder,
            )
        result.save(folder)
        if export is not None:
            note(f"graph: {circuits.write_graph(result, export)}")
        if not as_json:
            show(result, top, truth)
        agreement = agree(result, truth, folder, quiet=as_json)
        if not as_json:
            for remark in result.notes:
                out().print(Text(remark, style="yellow"), soft_wrap=True)
        page, curve = result.report(folder / "report.html", truth), None
        if faithfulness:
            curve = faithful(loaded, result, n, seed, folder, quiet=as_json)
            result.report(page, truth, curve)
    if as_json:
        judged = None if curve is None else {**vars(curve), "frame": records(curve.frame)}
        more = dict(folder=str(folder), report=str(page))
        emit(
            documents.circuit(result, top, truth, **more, agreement=agreement, faithfulness=judged)
        )
        return
    say_files(folder, page, result, agreement, curve)


def made(method: str, preset: str | None, written: list[str]) -> Any:
    """The method with its settings. Raises `UnknownNameError`, `InputError`."""
    if methods.is_file(method):
        return methods.of_file(method, preset, dict.fromkeys(written))
    cls = methods.registry.get(method)
    return cls.make(preset, **parse_settings(cls, written))


def parse_settings(cls: Any, written: list[str]) -> dict[str, Any]:
    """Read "mode=zero" as {"mode": "zero"}, typed as the method's field of that name. Raises
    `InputError`."""
    from interp.errors import InputError

    kinds = {
        f.name: getattr(f.type, "__name__", None) or str(f.type) for f in fields(cls) if f.init
    }
    values: dict[str, Any] = {}
    for entry in written:
        name, equals, value = entry.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not name:
            raise InputError(f"--set takes NAME=VALUE, like --set mode=zero, and not {entry!r}.")
        if name not in kinds:
            names = ", ".join(kinds) or "none"
            raise InputError(f"{name} is not a setting of the method {cls.name}; it takes {names}.")
        values[name] = _typed(cls.name, name, kinds[name], value)
    return values


def _typed(method: str, name: str, kind: str, value: str) -> Any:
    """`value` as what the annotation `kind` says. Raises `InputError`."""
    from interp.errors import InputError

    if "None" in kind and value.lower() == "none":
        return None
    try:
        if kind.startswith("bool"):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[
                value.lower()
            ]
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
        if kind.startswith("tuple[float"):
            return tuple(float(part) for part in value.split(","))
        if kind.startswith("tuple[int"):
            return tuple(int(part) for part in value.split(","))
    except (ValueError, KeyError):
        words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        form = words.get(kind.split(" ")[0], "numbers, like 1,2")
        raise InputError(f"{name} of {method} is {form}, not {value!r}.") from None
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def written(path: Path | None, task: str | None, faithfulness: bool) -> list[Any] | None:
    """The rows of a prompt file, if there is one; else the task is checked. Raises `InputError`,
    `UnknownNameError`."""
    from interp.errors import InputError

    if path is None:
        tasks.get(task or "ioi")
        return None
    if task is not None:
        raise InputError(
            "A circuit is looked for on a task or on prompts of one's own; leave --task or "
            "--prompts out."
        )
    if faithfulness:
        raise InputError(
            "Faithfulness is measured on other prompts than the circuit was found on, and "
            "--prompts has only these; "
            "leave --faithfulness out, or call interp.circuits.faithfulness in Python with other "
            "prompts."
        )
    from interp.circuits.runs.prompts import read

    return read(path)


def known(compare: str | None, model: str, task: str, own: bool) -> Truth | None:
    """What `--compare` names; None where nothing, or where it takes the loaded model's name to
    tell.

    Raises `InputError`, `OutputError`, `UnknownNameError`.
    """
    if compare is None:
        return None
    from interp.circuits.known.truth import Truth, published_for, published_names
    from interp.errors import InputError

    if compare != PUBLISHED:
        if not Path(compare).is_file():
            raise InputError(
                f"There is no circuit file {compare}; --compare takes published, or a JSON file "
                "(Truth.save writes it)."
            )
        return Truth.load(compare)
    if own:
        raise InputError(
            "No circuit is known for prompts of one's own; give --compare a file, or leave it out."
        )
    if Path(model).expanduser().is_dir() and task in {t for t, _ in published_names()}:
        return None
    return published_for(task, model)


def show(found: Circuit, top: int, truth: Truth | None) -> None:
    """The task and how the model does it, and the strongest heads."""
    from interp.circuits.drawing import section
    from interp.report.heatmap import number, within

    console, search = out(), found.search
    line = (
        f", {search.task} by {search.method}, {search.n} pairs, accuracy "
        f"{search.accuracy.mean:.3f}, "
    )
    unit = search.unit
    line += (
        f"{search.metric} {search.clean.mean:.3g} {unit} (corrupted {search.corrupted.mean:.3g})"
    )
    console.print(Text.assemble((found.model, "bold"), line), soft_wrap=True)
    told(found)
    classes = {} if truth is None else _classes(truth)
    ranked = found.ranked(top)
    effect = section.effect_heading(ranked)
    known = [] if truth is None else [truth.name]
    columns = ["#", "head", "score", *([effect] if effect else []), *known]
    table = common.table(*columns, right=("#", "score", effect))
    for rank, r in enumerate(ranked, 1):
        cells: list[str | Text] = [
            str(rank),
            Text(str(r.head), style="bold"),
            within(number(r.score, 3), r.ends),
        ]
        cells += [section.signed(r)] if effect else []
        if truth is not None:
            none = Text("–", style="dim")
            cells.append(classes.get((r.head.layer, r.head.head), none))
        table.add_row(*cells)
    console.print(table)
    passes = f"{number(search.forwards, 1)} forward"
    passes += f" and {number(search.backwards, 1)} backward" if search.backwards else ""
    note(f"{passes} passes over the prompts, {number(search.seconds, 1)} s.")


def told(found: Circuit) -> None:
    """How the columns are read."""
    column = found.column
    note(f"score: {found.about(column).reading}")
    if f"{column}_effect" in found.frame:
        note(f"effect: {found.about(f'{column}_effect').reading}")


def _classes(truth: Truth) -> dict[tuple[int, int], str]:
    return {(h.layer, h.head): kind for h, kind in truth.heads.items()}


def agree(
    found: Circuit, truth: Truth | None, folder: Path, quiet: bool = False
) -> Agreement | None:
    """Print how the ranking agrees with the known circuit and save that; of a list of only the
    strongest heads, what can be told."""
    if truth is None:
        return None
    from interp.circuits.drawing.section import agreement_facts
    from interp.circuits.judging.agreement import AT, evaluate, precision_at

    for remark in truth.notes:
        note(remark)
    note(f"Known circuit: {truth.source}.")
    if not truth.complete:
        if quiet:
            return None
        at = ", ".join(
            f"{precision_at(found, truth, k):.2f} at {k}" for k in AT if k <= len(truth.heads)
        )
        out().print(f"{truth.name}: precision at least {at}", soft_wrap=True)
        return None
    agreement = evaluate(found, truth)
    if quiet:
        agreement.save(folder)
        return agreement
    table = common.table("", truth.name)
    for name, value in agreement_facts(agreement).items():
        table.add_row(name, value)
    out().print(table)
    agreement.save(folder)
    return agreement


def faithful(
    model: Any, found: Circuit, n: int, seed: int, folder: Path, quiet: bool = False
) -> Faithfulness:
    """Measure, print and save the faithfulness curve."""
    from interp import circuits

    with progress("Measuring faithfulness") as report:
        curve = circuits.faithfulness(model, found, n=n, seed=seed, progress=report)
    if quiet:
        curve.save(folder)
        return curve
    columns = ("heads kept", "share", "faithfulness [95 %]", "random heads", "with them removed")
    table = common.table(*columns, right=columns)
    for row in curve.frame.to_dict("records"):
        cell = (
            f"{_share(row['faithfulness'])} [{_share(row['faithfulness_low'])}, "
            f"{_share(row['faithfulness_high'])}]"
        )
        random = _share(row["random"]) if "random" in row else "–"
        table.add_row(
            str(row["k"]), _share(row["share"]), cell, random, _share(row["completeness"])
        )
    out().print(table)
    control = "" if curve.random_cpr is None else f" (random heads {curve.random_cpr:.3f})"
    out().print(f"CPR {curve.cpr:.3f}{control}, CMD {curve.cmd:.3f}", soft_wrap=True)
    for remark in curve.notes:
        note(remark)
    curve.save(folder)
    return curve


def _share(value: float) -> str:
    """Three decimals, and no "-0.000"."""
    return f"{round(value, 3) + 0.0:.3f}"


def say_files(
    folder: Path,
    page: Path,
    found: Circuit,
    agreement: Agreement | None,
    curve: Faithfulness | None,
) -> None:
    """Where everything is."""
    lines = [("Circuit", str(folder)), ("Report", str(page))]
    lines += [
        (name.upper() if len(name) < 4 else name.capitalize(), str(folder / name))
        for name in found.artefacts
    ]
    lines += [("Agreement", str(folder / "agreement.json"))] if agreement is not None else []
    lines += [("Curve", str(folder / "faithfulness.parquet"))] if curve is not None else []
    for name, path in lines:
        out().print(Text.assemble((f"{name:<10}", "dim"), path), soft_wrap=True)
