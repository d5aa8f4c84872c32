"""The loss of continuations: prompts are read under the edits, then the tokens after them are
predicted.

An edit such as ACT reads its sinks off all rows of a forward, so in one forward over a whole text
it sees the tokens it is to predict. Here each prompt is a forward of its own; the continuation
follows through the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import InputError
from interp.inputs.batches import rows_of
from interp.inputs.context import check_context, extrapolation
from interp.inputs.forward import forward
from interp.inputs.text import content, rows_of_text
from interp.inputs.tokenizer import Text
from interp.results.evaluation import Evaluation, edits_as_json, summarise
from interp.support.progress import Shown, reporting
from interp.support.provenance import provenance
from interp.tasks.task import Task
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from interp_hooks.edit import Edit
    from interp_hooks.model import HookedModel

METRIC = "loss, nats a token"
#: tokens of a continuation run together
CHUNK = 512


@reporting("Measuring the loss")
def continuation_loss(
    model: HookedModel,
    texts: str | Path | Sequence[str | Path | Sequence[int]],
    edits: Sequence[Edit] = (),
    prompt_share: float = 0.5,
    seed: int = 0,
    steps: bool = True,
    extrapolate: bool = False,
    progress: Shown = None,
    what: str = "texts",
) -> Evaluation:
    """Mean next-token loss on the continuation of each text, untouched and edited, with a paired
    bootstrap interval.

    The prompt (the first `prompt_share` of the tokens) is one forward under all edits; the
    continuation's tokens then follow through the cache under the edits whose scope is not prefill.
    The mean is over texts, each counting once.

    Args:
        texts: texts, `Path`s to such, or rows of token ids; one text or `Path` alone, too.
        edits: applied left to right.
        steps: feed the continuation token by token, as generation does; False: in chunks, faster
            and the same for edits that do to a row what they would do to it alone (ZeroTuning, not
            PAINT).
        extrapolate: allow texts longer than the model's positions.
        what: what the texts are, for the record.

    Raises:
        InputError: a text without continuation, or a model without cache under an edit that has a
            scope.
        ContextError, EditError, HeadError.
    """
    import pandas as pd

    if not 0 < prompt_share < 1:
        raise InputError(f"The prompt's share of a text is between 0 and 1, not {prompt_share}.")
    if not isinstance(texts, (str, Path)) and not len(texts):
        raise InputError("A loss needs at least one text.")
    texts = [texts] if isinstance(texts, (str, Path)) else texts
    rows = [
        Text(model.tokenizer).prompt(content(t)) if isinstance(t, (str, Path)) else list(t)
        for t in texts
    ]
    if min(map(len, rows)) < 2:
        raise InputError("A text of fewer than two tokens has no continuation; give longer texts.")
    longest = max(map(len, rows))
    check_context(model, longest, extrapolate)
    cuts = [min(max(1, round(prompt_share * len(r))), len(r) - 1) for r in rows]
    if not steps and any(e.scope == "decode" for e in edits):
        raise InputError(
            "An edit of decode steps needs the continuation token by token; use steps=True."
        )
    if not model.has_cache and any(e.scope != "all" for e in edits):
        raise InputError(
            f"{model.name} has no cache, so prompt and continuation can't be told apart; use scope "
            "all."
        )
    total = len(rows) * (2 if edits else 1)
    report = progress or (lambda done, total, what: None)
    frame = pd.DataFrame({"tokens": [len(r) - c for r, c in zip(rows, cuts, strict=True)]})
    frame["baseline"] = _losses(
        model, rows, cuts, (), steps, lambda k: report(k, total, "untouched")
    )
    if edits:
        frame["edited"] = _losses(
            model, rows, cuts, edits, steps, lambda k: report(len(rows) + k, total, "edited")
        )
    beyond = extrapolation(model, longest)
    settings = dict(
        task=what,
        metric="loss",
        n=len(rows),
        prompt_share=prompt_share,
        steps=steps and model.has_cache,
        context=longest,
        extrapolate=beyond,
        edits=edits_as_json(edits),
        backend=model.backend,
    )
    record = provenance(model, seed, settings, [torch.tensor(r) for r in rows], list(edits))
    return summarise(what, METRIC, frame, seed, record, [past(beyond)] if beyond else [])


def past(beyond: dict[str, Any]) -> str:
    """The note on a run past the model's positions."""
    rope = beyond["rope"]
    kind = f": RoPE ({rope.get('rope_type', 'default')}) at angles not trained on" if rope else ""
    return (
        f"context {beyond['context']} is {beyond['factor']:.3g} × the model's "
        f"{beyond['positions']} positions{kind}."
    )


def rows_for_loss(
    model: HookedModel, task: Task | None, text: str | None, context: int, n: int, seed: int
) -> list[list[int]]:
    """`n` rows of `context` tokens: a task's solved problems one after the other, else `text`, else
    generated prose."""
    if task is None:
        return rows_of_text(model.tokenizer, text, context, n, seed)
    reader, rows = Text(model.tokenizer), []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        ids = list(reader.bos)
        while len(ids) < context:
            ids += reader.encode(" " + task.document(reader, rng))
        rows.append(ids[:context])
    return rows


@torch.no_grad()
def _losses(
    model: HookedModel,
    rows: Sequence[Sequence[int]],
    cuts: Sequence[int],
    edits: Sequence[Edit],
    steps: bool,
    progress: Callable[[int], None],
) -> list[float]:
    """Mean loss of each row's continuation."""
    losses = [float("nan")] * len(rows)
    done = 0
    for group in _groups(rows, cuts):
        ids, cut = torch.tensor([list(rows[i]) for i in group]), cuts[group[0]]
        loss = torch.cat(
            list(_continued(model, ids, cut, edits, steps)), 1
        )  # (batch, continuation)
        for i, value in zip(group, loss.mean(-1).tolist(), strict=True):
            losses[i] = value
        done += len(group)
        progress(done)
    return losses


def _groups(rows: Sequence[Sequence[int]], cuts: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows that are run together: equal lengths (so no padding) within the token
    budget."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        by_shape.setdefault((len(row), cut), []).append(i)
    for (length, _), members in by_shape.items():
        size = rows_of(length)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _continued(
    model: HookedModel, ids: torch.Tensor, cut: int, edits: Sequence[Edit], steps: bool
) -> Iterator[torch.Tensor]:
    """The losses (batch, some) of ids[:, cut:], in order."""
    last = ids.shape[1] - 1  # the last token is predicted, never fed
    if not model.has_cache:
        with model.edit(*edits):
            out = forward(model, ids[:, :-1])
        logits = logits_of(out)
        yield _loss(logits[:, cut - 1 :], ids[:, cut:])
        return
    with model.edit(*edits):
        out = forward(model, ids[:, :cut], use_cache=True, keep=1)
    yield _loss(out.logits[:, -1:], ids[:, cut : cut + 1])
    later = edits if steps else [e for e in edits if e.scope == "all"]
    size = 1 if steps else CHUNK
    with model.edit(*later):
        for start in range(cut, last, size):
            stop = min(start + size, last)
            out = forward(
                model, ids[:, start:stop], use_cache=True, past_key_values=out.past_key_values
            )
            yield _loss(out.logits, ids[:, start + 1 : stop + 1])


def _loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) float32 from (batch, tokens, vocabulary)."""
    logits = logits.float()
    target_logits = logits.gather(-1, target.to(logits.device)[..., None])[..., 0]
    return torch.logsumexp(logits, -1) - target_logits
