"""`interp show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from interp.cli import common
from interp.cli.common import note, out

if TYPE_CHECKING:
    from interp.atlas import Atlas


def show(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of a scan or an evaluation, or a score file.", metavar="DIR"),
    ],
    score: Annotated[
        str | None, typer.Option(help="Rank the heads by this score; without it, all scores.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads.")] = 20,
    tower: Annotated[
        str | None, typer.Option(help="Only this tower, in models of several.")
    ] = None,
) -> None:
    """Show a saved scan: the top heads of all scores, or the ranking by one; or a saved
    evaluation."""
    from interp.results.evaluation import HEAD

    if (folder / HEAD).is_file() and not (folder / "atlas.json").is_file():
        evaluation(folder, score)
        return
    from interp.atlas import Atlas

    atlas = Atlas.read(folder) if folder.is_file() else Atlas.load(folder)
    console = out()
    if score is None:
        console.print(common.about_line(atlas), soft_wrap=True)
        console.print(common.top_table(atlas, console.width))
        massive = common.massive_line(atlas)
        if massive is not None:
            console.print(massive, soft_wrap=True)
        for remark in atlas.notes:
            console.print(Text(remark, style="yellow"), soft_wrap=True)
        return
    ranking(atlas, score, top, tower)


def evaluation(folder: Path, score: str | None) -> None:
    """What `interp evaluate --out` saved, as it was printed then. Raises `InputError` when scores
    are asked for."""
    from interp.cli import evaluate
    from interp.errors import InputError
    from interp.results.evaluation import Evaluation

    if score is not None:
        raise InputError(
            f"{folder} holds an evaluation, which has no scores of heads; leave --score out."
        )
    result = Evaluation.load(folder)
    evaluate.show(str(result.provenance.get("model") or "unnamed model"), result)
    note("A row an instance, in Python: interp.Evaluation.load(DIR).frame.")


def ranking(atlas: Atlas, score: str, top: int, tower: str | None) -> None:
    """One score: how to read it, and its strongest heads."""
    from interp.report.heatmap import number
    from interp.results.places import noun
    from interp_hooks.heads import Head

    about, ranked = atlas.about(score), atlas.ranking(score, top, tower)
    console = out()
    console.print(common.about_line(atlas), soft_wrap=True)
    if about.reading:
        note(about.reading)
    for remark in atlas.notes:
        if remark.startswith(f"{score}:"):
            console.print(Text(remark, style="yellow"), soft_wrap=True)
    if not ranked:
        console.print(f"{about.title}: not measured in any head.")
        return
    measured = str(atlas.measured(score))
    sampled = any(error is not None for _, _, error in ranked)
    value = f"{score} ({about.unit})" if about.unit else score
    grain = about.grain
    columns = ["#", noun(grain), *(["kv head"] if grain == "head" else []), value]
    columns += ["±"] if sampled else []
    table = common.table(*columns, right=("#", "kv head", value, "±"))
    places = atlas.frame.set_index(["tower", "layer", "head"])["kv_head"]
    places = places[~places.index.duplicated()]
    for n, (place, mean, error) in enumerate(ranked, 1):
        counts = about.threshold is not None and mean >= about.threshold
        row: list[str | Text] = [
            str(n),
            Text(str(place), style="bold" if counts else ""),
        ]
        if isinstance(place, Head):
            kv_head = places[place.tower, place.layer, place.head]
            row.append(str(kv_head) if kv_head >= 0 else "–")  # a file without its model
        row += [
            number(mean, 3),
            *([number(error, 3) if error is not None else ""] if sampled else []),
        ]
        table.add_row(*row)
    console.print(table)
    if about.threshold is not None:
        note(
            f"{atlas.above(score)} {noun(grain, several=True)} are at or above "
            f"{number(about.threshold)}, from which a {noun(grain)} counts"
            + (f", at {measured}." if measured else ".")
        )
