"""Massive activations: a few numbers of the residual stream that are thousands of times the rest
(Sun et al. 2024, arXiv 2402.17762)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.text import check_seed
from interp.inputs.text import content as text_of
from interp.probes.settings import Settings
from interp.results.massive import COLUMNS, MassiveActivations, typed
from interp.support.checked import number, whole_number
from interp.support.provenance import provenance

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: what counts as massive, as Sun et al. have it
LEAST, RATIO = 100.0, 1000.0
#: what a report lists beside them: tokens further on that attract heads of their own
SECONDARY = 300.0
CONTEXT = 256


def massive_activations(
    model: Any,
    context: int = CONTEXT,
    samples: int = 16,
    seed: int = 0,
    text: str | Path | None = None,
    inputs: Any = None,
    least: float = LEAST,
    ratio: float = RATIO,
) -> MassiveActivations:
    """Lists every entry of the residual stream that is large, and large beside its layer's median.

    That is |x| > `least` and |x| > `ratio` · median |x|, over the layer's tokens and dimensions.
    Few dimensions at few tokens (the first, often a delimiter or an article) hold them from some
    layer on, whatever the text; heads that rest on these tokens are sinks.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        context: tokens of a text.
        samples: how many texts.
        seed: of the texts.
        text: a text to cut them from, or a `Path` to one.
        inputs: token ids of your own, (rows, tokens), instead of texts.
        least, ratio: the thresholds.

    Returns:
        `MassiveActivations`: a row an activation, and a summary.

    Raises:
        InputError: thresholds or sizes that can't be used.

    Example:
        >>> table = interp.massive_activations(model, context=32, samples=2)
        >>> table.rule
        "|x| > 100 and > 1,000 × the layer's median"
    """
    from interp.inputs.rows import own_rows
    from interp.loading import load

    hooked, own = load(model), own_rows(inputs)
    content = text_of(text) if text is not None else None
    if own is not None:
        context, samples = max(map(len, own)), len(own)
    check_seed(seed)
    settings = Settings(
        whole_number(context, "The context"),
        whole_number(samples, "samples, the number of texts,"),
        seed,
        content,
        inputs=own,
    )
    least, ratio = number(least, "least"), number(ratio, "ratio")
    return massive_of(hooked, settings, least, ratio)


@torch.no_grad()
def massive_of(
    model: HookedModel, settings: Settings, least: float = LEAST, ratio: float = RATIO
) -> MassiveActivations:
    """The massive activations of the texts of these settings."""
    if settings.context < 2 or settings.samples < 1:
        raise InputError("Massive activations need at least 1 text of at least 2 tokens.")
    if least < 0 or ratio < 0:
        raise InputError("The thresholds of massive activations can't be negative.")
    rows = settings.rows(model.tokenizer, settings.context)
    found = [
        (sample, *entry)
        for sample, row in enumerate(rows)
        for entry in _of_row(model, row, least, ratio)
    ]
    frame = pd.DataFrame(
        found, columns=["sample", "layer", "position", "dimension", "value", "ratio"]
    )
    frame["token_id"] = [
        rows[s][p] for s, p in zip(frame["sample"], frame["position"], strict=True)
    ]
    frame["token"] = [_said(model.tokenizer, t) for t in frame["token_id"]]
    said = dict(
        context=settings.context,
        samples=len(rows),
        text=settings.text is not None,
        least=least,
        ratio=ratio,
    )
    record = provenance(model, settings.seed, said, [torch.tensor(r) for r in rows])
    return MassiveActivations(typed(frame[list(COLUMNS)]), record)


def _of_row(
    model: HookedModel, row: list[int], least: float, ratio: float
) -> list[tuple[int, int, int, float, float]]:
    """(layer, position, dimension, value, ratio) of one text."""
    found: list[tuple[int, int, int, float, float]] = []

    def note(place: str, layer: int, stream: torch.Tensor) -> None:
        residual.clear()  # a layer at a time
        if place == "pre" or (place == "post" and layer == model.n_layers - 1):
            large = _large(stream[0], least, ratio)
            found.extend((layer + (place == "post"), *entry) for entry in large)

    with model.capture_resid(note) as residual:
        forward(model, torch.tensor([row]), keep=1)
    return found


def _large(stream: torch.Tensor, least: float, ratio: float) -> list[tuple[int, int, float, float]]:
    """(position, dimension, value, ratio) of the large entries of (tokens, d_model)."""
    values = stream.float().cpu().numpy()
    size = np.abs(values)
    median = float(np.median(size))
    places = np.argwhere((size > least) & (size > ratio * median))
    return [
        (int(p), int(d), float(values[p, d]), float(size[p, d]) / max(median, 1e-30))
        for p, d in places
    ]


def _said(tokenizer: Any, token: int) -> str:
    """A token as the tokenizer writes it; its number where there is no tokenizer."""
    return str(token) if tokenizer is None else str(tokenizer.convert_ids_to_tokens(token))
