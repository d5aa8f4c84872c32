"""Scan every head for the chosen scores in the fewest forward passes; interruptible, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.inputs.rows import own_rows
from interp.inputs.text import check_seed
from interp.inputs.text import content as text_of
from interp.probes.settings import Settings
from interp.scan import pictures_alone
from interp.scan.pictures import check_drawn
from interp.scan.plan import fitting
from interp.scan.work import Scan
from interp.scores.catalogue import asked_by_name, select
from interp.support.checked import whole_number
from interp.support.progress import Progress, bar
from interp.vision.pictures import files_in
from interp.vision.prompts import needs_image_tokens, needs_images, takes_images
from interp.vision.towers import sees_alone
from interp.vision.words import chosen

if TYPE_CHECKING:
    from interp.atlas import Atlas
    from interp_hooks.model import HookedModel

DEFAULT_CONTEXT = 1024


def plan_scan(
    model: Any,
    scores: str | list[str] = "default",
    context: int | None = None,
    samples: int = 16,
    seed: int = 0,
    text: str | Path | None = None,
    extrapolate: bool = False,
    images: str | Path | None = None,
    prompt: str | None = None,
    *,
    format: str | None = None,
    haystack: str | Path | None = None,
    needle: str | None = None,
    question: str | None = None,
    inputs: Any = None,
    force: bool = False,
    words: str | Sequence[str] | None = None,
    chunk: int | None = None,
) -> Scan:
    """The plan of a scan, before it runs: `plan.rows`, `plan.seconds`, `plan.run()`.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        scores: "default", "all", or names; "-name" takes one out, as in "all,-importance".
        context: tokens of the text rows and the longest needle prompt; by default 1024, or the
            model's limit if that is lower. A model that reads pictures alone (ViT) takes no setting
            of texts.
        samples: rows or problems a probe.
        seed: of the rows and problems.
        text: a text to cut rows from, or a `Path` to one, instead of the English shipped here.
        extrapolate: allow a context beyond the model's positions.
        images: a folder of pictures for the image scores, instead of rendered scenes; the first
            `samples` by name.
        prompt: what is asked about each picture; by default "describe the picture :".
        format: of needle prompts, as in `interp.evaluate`; by default what the model understands
            best.
        haystack: a text to hide needles in, or a `Path` to one, instead of the English shipped
            here.
        needle: a fact of your own to hide, "The … is …"; or with a bar where its answer begins.
        question: what asks for it; made of the needle if not given.
        inputs: token ids of your own instead of text, (rows, tokens) or a list of rows; a model
            without a tokenizer is scanned on these alone.
        force: keep scores measured on a task that the model can't do.
        words: draw where the heads that look at pictures most look when these words come, in each
            of the first four pictures: from the token that predicts the word in the prompt, or else
            in the model's own caption.
        chunk: read texts so many tokens at a time over a cache, for long ones: the same scores
            (but for rounding) in the memory of a chunk and the cache. Scores that run the model
            themselves (importance) read their short texts at once all the same.

    Returns:
        A `Scan`: what it reads, how long it takes, and how to run it.

    Raises:
        UnknownNameError, ContextError, InputError.

    Example:
        >>> plan = interp.plan_scan(model, ["previous_token"], context=64, samples=2)
        >>> plan.rows
        [('repeated random tokens', 'previous_token', '101 × 2')]
    """
    from interp.loading import load

    check_seed(seed)
    selection = select(scores)  # names are checked before a model is loaded
    if not selection:
        raise InputError(
            "No score was named; use default, all, or names from `interp.scores.names()`."
        )
    content = text_of(text) if text is not None else None
    if haystack is not None:
        text_of(haystack, "haystack")
    if images is not None:
        files_in(images)
    if inputs is not None and text is not None:
        raise InputError("Rows are cut from a text or are token ids of your own, not both.")
    sought = None if words is None else chosen(words)
    hooked = load(model)
    if sought is not None:
        needs_image_tokens(hooked, "words=")
    asked = selection
    selection = fitting(hooked, asked, asked_by_name(scores), images)
    if sought is not None:
        check_drawn(selection)
    if (images is not None or prompt is not None) and not sees_alone(hooked):
        needs_images(hooked, "images=" if images is not None else "prompt=")
    own = own_rows(inputs)
    alone = sees_alone(hooked)
    if alone:
        texts: dict[str, Any] = dict(
            text=text, prompt=prompt, format=format, haystack=haystack, needle=needle
        )
        texts.update(context=context, inputs=inputs, question=question, extrapolate=extrapolate)
        pictures_alone.refuse_text(hooked, **texts)
    if not alone:
        _check_reads(hooked)
    if hooked.tokenizer is None and own is None and not alone:
        raise InputError(
            f"{hooked.name} came without a tokenizer; pass interp.load(model, tokenizer=...), or "
            "token ids as inputs=."
        )
    if context is None:
        limit = hooked.max_context or DEFAULT_CONTEXT
        context = min(DEFAULT_CONTEXT, limit) if own is None else max(32, *map(len, own))
    settings = Settings(
        whole_number(context, "The context"),
        len(own) if own is not None else whole_number(samples, "samples, the number of inputs,"),
        seed,
        content,
        None if images is None else str(images),
        prompt,
        format or "auto",
        None if haystack is None else str(haystack),
        needle,
        question,
        own,
        force,
        sought,
        None if chunk is None else whole_number(chunk, "chunk, tokens at a time,"),
    )
    scan = Scan(hooked, selection, settings, extrapolate)
    unseen = [s.name for s in asked if s.needs_scenes and takes_images(hooked)]
    if images is not None and unseen:
        scan.notes.append(
            f"{', '.join(unseen)}: left out, for where each thing lies is known in rendered scenes "
            f"alone, not in the pictures of {images}."
        )
    if alone:
        named = asked_by_name(scores)
        pictures_alone.check_defined(hooked, scan.scores, scan._batches, scan.notes, named)
    return scan


def scan_heads(
    model: Any,
    scores: str | list[str] = "default",
    context: int | None = None,
    samples: int = 16,
    seed: int = 0,
    text: str | Path | None = None,
    extrapolate: bool = False,
    images: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path | None = None,
    progress: Progress | bool | None = True,
    overwrite: bool = False,
    **needles: Any,
) -> Atlas:
    """Scores every head of a model on seeded probes.

    Args:
        model, scores, context, samples, seed, text, extrapolate, images, prompt: as in `plan_scan`.
        needles: format, haystack, needle, question, inputs, force, words and chunk, as there.
        out: folder to save to (and resume from).
        progress: True shows a bar with time left, False nothing, or a function (done, total,
            label).
        overwrite: replace a finished result of another scan in `out`.

    Returns:
        An `Atlas`: a column a score, a row a head.

    Raises:
        UnknownNameError, ContextError, InputError, OutputError.

    Example:
        >>> interp.scan_heads(model, ["previous_token"], context=64, samples=2, progress=False)
        Atlas(pocket-llama: 4 layers × 8 heads; previous_token)
    """
    plan = plan_scan(
        model, scores, context, samples, seed, text, extrapolate, images, prompt, **needles
    )
    folder = Path(out) if out is not None else None
    if callable(progress):
        return plan.run(folder, progress, overwrite)
    with bar("scan", enabled=bool(progress)) as callback:
        return plan.run(folder, callback, overwrite)


def _check_reads(model: HookedModel) -> None:
    """Raise `InputError` for a model whose input is neither text nor pictures."""
    seen = "scans read texts or pictures; its heads are seen by model.observe and model.capture_z"
    if "timestep" in model.accepts:
        raise InputError(
            f"{model.name} draws pictures step by step, and {seen}, and interp.diffusion.hunt says "
            "which matter for what is drawn."
        )
    if getattr(model.module, "main_input_name", "") in ("input_features", "input_values"):
        crosses = any(site.kind == "cross" for site in model.sites)
        where = ", and interp.mechanics.cross_agreement says where its cross-attention looks"
        raise InputError(f"{model.name} reads sound, and {seen}{where if crosses else ''}.")
