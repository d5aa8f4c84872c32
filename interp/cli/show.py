"""`interp show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from interp.cli import as_json as documents
from interp.cli import common
from interp.cli.as_json import emit
from interp.cli.common import note, out

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp.results.evidence import Passage


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
    head: Annotated[
        str | None, typer.Option(help="The card of one head: roles, passages, partners, scores.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print JSON: an object of all scores or a head's card; records of a ranking.",
        ),
    ] = False,
) -> None:
    """Show a saved scan: the top heads of all scores, the ranking by one, or the card of a head; or
    a saved evaluation."""
    from interp.results.evaluation import HEAD

    if (folder / HEAD).is_file() and not (folder / "atlas.json").is_file():
        evaluation(folder, score, as_json)
        return
    from interp.atlas import Atlas

    atlas = Atlas.read(folder) if folder.is_file() else Atlas.load(folder)
    if as_json:
        if head is not None:
            emit(atlas.card(head))
        else:
            one = None if score is None else documents.ranked(atlas, score, top, tower)
            emit(documents.atlas(atlas) if one is None else one)
        return
    console = out()
    if head is not None:
        card(atlas, head)
        return
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


def evaluation(folder: Path, score: str | None, as_json: bool = False) -> None:
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
    if as_json:
        emit({"model": result.provenance.get("model"), **result.summary()})
        return
    evaluate.show(str(result.provenance.get("model") or "unnamed model"), result)
    note("A row an instance, in Python: interp.Evaluation.load(DIR).frame.")


def card(atlas: Atlas, head: str) -> None:
    """A head's roles with their reasons, passages, directions, partners and scores."""
    from interp.report import card_text

    shown, console = atlas.card(head), out()
    of, _, said = card_text.title(shown).partition(": ")
    console.print(Text.assemble((of, "bold"), f": {said}"), soft_wrap=True)
    note(card_text.sharing_said(shown))
    for role in shown.roles:
        console.print(Text.assemble("  ", (role.name, "bold"), f": {role.reason}"))
    for text in shown.extremes:
        console.print(Text(f"  {text}"))
    kept = shown.evidence
    if kept is None:
        note("This scan kept no passages; scan again for them.")
    else:
        if kept.passages:
            console.print(Text.assemble(
                "\nWhere it does most, by attention weight, from the ",
                ("token that looks", "bold yellow"), " to the ",
                ("token looked at", "bold cyan underline"),
            ))  # fmt: skip
        for p in card_text.ordered(kept.passages):
            console.print(_passage(p, console.is_terminal))
        if kept.built is not None:
            console.print(Text(f"  {card_text.built_said(kept.built)}"), soft_wrap=True)
        writes = [card_text.writes_said(w) for w in kept.writes]
        partners = [f"It {said}" for said in card_text.partners_said(kept.partners)]
        for heading, some in ((card_text.WRITES, writes), (card_text.PARTNERS, partners)):
            if some:
                console.print(Text(f"\n{heading}"))
            for line in some:
                console.print(Text(f"  {line}"))
    grid = common.table(*card_text.HEADINGS, right=card_text.HEADINGS[1:])
    for s in shown.standings:
        name, *cells = card_text.row(s)
        grid.add_row(Text(name, style="bold" if s.reaches else ""), *cells)
    console.print(grid)
    note("Bold: at its threshold. =: others have the same value; ties count half in percentiles.")


def _passage(passage: Passage, colours: bool) -> Text:
    """A passage in colours, or with ▸the token that looks◂ and [the one looked at] marked."""
    from interp.report.card_text import passage_text
    from interp.report.heatmap import number

    if not colours:
        return Text(f"  {passage_text(passage.parts)}  ({number(passage.weight)})")
    styles = {"query": "bold yellow", "key": "bold cyan underline", "both": "bold yellow underline"}
    text = Text("  ")
    for piece, role in passage.parts:
        text.append(" ".join(piece.replace("\n", " ↵ ").split(" ")), style=styles.get(role, ""))
    text.append(f"  ({number(passage.weight)})", style="dim")
    return text


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
