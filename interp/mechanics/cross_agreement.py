"""Does cross-attention agree with attribution? What a decoder's heads look at, against the part of
the encoder's input that its words rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError, TapError
from interp.mechanics.crossing import Crossing, crossings
from interp.mechanics.saliency import SALIENCIES, STEPS, Entered, check
from interp.support.progress import Progress, reporting
from interp.support.statistics import bootstrap, mean_and_error, spearman

if TYPE_CHECKING:
    import pandas as pd

    from interp_hooks.call import Site

OF = ("input", "encoder")


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r; NaN where one is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 or not np.isfinite(b).all():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}


@reporting("Attribution")
def cross_agreement(
    model: Any,
    samples: Sequence[Any],
    targets: Sequence[Sequence[int]] | None = None,
    of: str = "input",
    methods: Sequence[str] | None = None,
    spans: Sequence[Sequence[tuple[int, int] | None]] | None = None,
    steps: int = STEPS,
    baseline: str = "mean",
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Correlation of each cross head's attention with what the told words rest on in the input.

    A sample's map of attention is (told tokens, encoder positions), the row that predicts each
    token; its map of attribution is |a_t| of the token's logit less the mean logit, by
    `interp.mechanics.saliency`, summed over the frames of an encoder position, each row divided by
    its sum. Pearson's r and Spearman's
    ρ are between the flattened maps, and means over samples ("Cross-Attention is Half the
    Explanation in Speech-to-Text Models", 2025, arXiv 2509.18010; there the attribution is SPES,
    which hides parts of a spectrogram, and of words).

    Args:
        model: an encoder-decoder `HookedModel` (speech or text), or what `interp.load` takes.
        samples: texts, or mappings of what the forward takes of one input, (1, …).
        targets: of each sample the told tokens, without the start; None: what the model tells,
            without the end too.
        of: "input", or "encoder": attribution to what the encoder gives, which cross-attention
            reads, so that what the encoder mixes is left out.
        methods: of `SALIENCIES`; None for all that know the model.
        spans: of each sample and told token the encoder positions (start, stop) where it is known
            to lie, None where it is not.
        steps, baseline: of the attributions; the "mean" of sound is its own mean frame, of text the
            mean embedding.
        max_new_tokens: of what the model tells, at most; the places that it has are the limit too.
        seed: of the intervals.
        progress: True for a bar, or a function (done, total, what).

    Returns:
        A row a cross head with the columns an atlas begins with, then `pearson_…` and `spearman_…`
        of the methods and `…_stderr`, and with spans `on_span`, the share of its attention that
        lies on a told token's own. `attrs`: `layers` and `all`, the same of the mean over a layer's
        heads and over all, each {"mean", "low", "high", "n"} with a 95 % bootstrap interval over
        samples; `shuffled`, `all` with another sample's attributions (the last control: what any
        two maps of speech have in common); `span`: each method's share on the spans, and that of an
        even map; `notes`.

    Misleads:
        A map's rows all move on in time, so that a map of another sample of the same length
        agrees too: read `shuffled` beside `all`.

    Raises:
        InputError: a model without cross-attention; samples, targets, spans or options that don't
            fit.
        TapError: a method, asked for by name, that does not know a part of the model.

    Example:
        >>> whisper = interp.load("whisper")
        >>> sound = interp.scenes.waveform(interp.scenes.melody(0))
        >>> heard = whisper.processor(sound, sampling_rate=16000, return_tensors="pt")
        >>> frame = interp.mechanics.cross_agreement(whisper, [heard], methods=["gradient"])
        >>> len(frame), bool(frame["pearson_gradient"].max() > 0.5)
        (8, True)
    """
    from interp.loading import load
    from interp.results.frame import rows_of

    check(steps, baseline)
    hooked = load(model)
    wanted = _methods(methods)
    if of not in OF:
        raise InputError(f"Attribution is of {' or '.join(OF)}, not {of!r}.")
    given = crossings(hooked, samples, targets, max_new_tokens)
    _check_spans(spans, given)
    maps: list[dict[str, np.ndarray]] = []
    rows: list[dict[Site, np.ndarray]] = []
    refused: dict[str, str] = {}
    for i, crossing in enumerate(given):
        if progress is not None:
            progress(i, len(given), f"sample {i + 1}")
        rows.append(crossing.rows())
        entered = crossing.entered(of, baseline)
        keys = next(iter(rows[-1].values())).shape[-1]
        _check_inside(spans, i, keys)
        found = {}
        for name in wanted:
            try:
                found[name] = _map(entered, name, steps, keys)
            except TapError as reason:
                if methods is not None or name not in ("deeplift", "lrp"):
                    raise
                refused[name] = str(reason)
        maps.append(found)
    wanted = [name for name in wanted if name not in refused]
    sites = sorted(rows[0], key=lambda s: s.layer)
    frame = rows_of(sites)
    layers: list[dict[str, Any]] = [dict(layer=s.layer) for s in sites]
    everything: dict[str, Any] = {}
    shuffled: dict[str, Any] = {}
    for name in wanted:
        for measure, correlate in MEASURES.items():
            column = f"{measure}_{name}"
            heads = np.array(
                [
                    [correlate(a.ravel(), m[name].ravel()) for s in sites for a in r[s]]
                    for r, m in zip(rows, maps, strict=True)
                ]
            )  # (samples, heads)
            frame[column], frame[f"{column}_stderr"] = mean_and_error(heads)
            for row, site in zip(layers, sites, strict=True):
                each = [
                    correlate(r[site].mean(0).ravel(), m[name].ravel())
                    for r, m in zip(rows, maps, strict=True)
                ]
                row[column] = _interval(each, seed)
            means = [np.concatenate([r[s] for s in sites]).mean(0) for r in rows]
            own = [correlate(a.ravel(), m[name].ravel()) for a, m in zip(means, maps, strict=True)]
            everything[column] = _interval(own, seed)
            others = [_against_other(correlate, a, maps, i, name) for i, a in enumerate(means)]
            shuffled[column] = _interval(others, seed)
    frame.attrs.update(
        of=of,
        n=len(given),
        told=[c.told for c in given],
        layers=layers,
        all=everything,
        shuffled=shuffled,
        notes=list(refused.values()),
    )
    if spans is not None:
        frame["on_span"] = _on_spans([np.concatenate([r[s] for s in sites]) for r in rows], spans)
        shares = {n: float(_on_spans([m[n][None] for m in maps], spans)[0]) for n in wanted}
        even = _on_spans([np.full_like(m, 1 / m.shape[-1])[None] for m in means], spans)
        frame.attrs["span"] = {**shares, "even": float(even[0])}
    return frame


def _methods(methods: Sequence[str] | None) -> list[str]:
    wanted = list(SALIENCIES) if methods is None else list(methods)
    unknown = [m for m in wanted if m not in SALIENCIES]
    if unknown or not wanted:
        raise InputError(
            f"Methods of attribution are {', '.join(SALIENCIES)}, not {unknown or 'none'}."
        )
    return wanted


def _map(entered: Entered, method: str, steps: int, keys: int) -> np.ndarray:
    """(told, keys): |a| summed over the frames of each key, rows divided by their sums."""
    sizes = SALIENCIES[method](entered, steps).abs().cpu().numpy()  # (told, frames)
    if sizes.shape[1] % keys:
        raise InputError(
            f"An input of {sizes.shape[1]} frames is not a whole number of frames for each of the "
            f"encoder's {keys} positions; use of='encoder'."
        )
    pooled: np.ndarray = sizes.reshape(len(sizes), keys, -1).sum(-1)
    total = pooled.sum(-1, keepdims=True)
    return pooled / np.where(total > 0, total, 1)


def _against_other(
    correlate: Callable[[np.ndarray, np.ndarray], float],
    attention: np.ndarray,
    maps: list[dict[str, np.ndarray]],
    i: int,
    name: str,
) -> float:
    """A sample's attention against the next one's attributions, over the rows and keys that both
    have."""
    if len(maps) < 2:
        return float("nan")
    other = maps[(i + 1) % len(maps)][name]
    told, keys = (min(n) for n in zip(attention.shape, other.shape, strict=True))
    return correlate(attention[:told, :keys].ravel(), other[:told, :keys].ravel())


def _check_spans(spans: Any, given: list[Crossing]) -> None:
    if spans is None:
        return
    if len(spans) != len(given):
        raise InputError(f"There are {len(given)} samples and spans of {len(spans)}.")
    for i, (own, crossing) in enumerate(zip(spans, given, strict=True)):
        if len(own) != len(crossing.told):
            raise InputError(
                f"Sample {i} tells {len(crossing.told)} tokens, and has spans of {len(own)}; give "
                "None for a token that lies nowhere."
            )


def _check_inside(spans: Any, sample: int, keys: int) -> None:
    """Raise `InputError` for a span that is not among the encoder's positions."""
    for span in () if spans is None else spans[sample]:
        if span is not None and not 0 <= span[0] < span[1] <= keys:
            raise InputError(
                f"Sample {sample} has a span {tuple(span)}, and its encoder the positions 0 to "
                f"{keys - 1}."
            )


def _on_spans(maps: Sequence[np.ndarray], spans: Sequence[Any]) -> np.ndarray:
    """(heads,): the share of maps (heads, told, keys) that lies on the tokens' spans, mean over
    tokens."""
    shares = [
        m[:, t, start:stop].sum(-1)
        for m, own in zip(maps, spans, strict=True)
        for t, (start, stop) in ((t, s) for t, s in enumerate(own) if s is not None)
    ]
    if not shares:
        raise InputError("No told token has a span.")
    return np.mean(shares, 0)


def _interval(values: Sequence[float], seed: int) -> dict[str, Any] | None:
    defined = [v for v in values if np.isfinite(v)]
    return dict(vars(bootstrap(defined, seed))) if defined else None
