"""How sentences of a text hang together: who looks back at which, and what it matters.

Thought Anchors (2025, arXiv 2506.19143). Sentences rather than tokens are what a chain of thought
is made of; a *receiver head* is one whose later sentences all look back at the same few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.edits.keys import Span
from interp.edits.scale_tokens import ScaleTokens
from interp.errors import InputError
from interp.inputs.endings import main_heads
from interp.inputs.forward import forward
from interp.inputs.pieces import pieces
from interp.inputs.sentences import sentences
from interp.inputs.text import content
from interp.inputs.tokenizer import Text
from interp_hooks.logits import logits_of
from interp_hooks.question import Question, SiteQuestion
from interp_hooks.weight_rows import WeightRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interp_hooks.call import AttentionCall
    from interp_hooks.heads import Head

#: a sentence is judged by those that begin so many sentences later, as the authors do
GAP = 4
#: sentences that a text needs for a kurtosis to mean something
LEAST = GAP + 4
#: tokens that a sentence has at least
TOKENS = 3


@dataclass(frozen=True)
class SentenceLinks:
    """How much each head's sentences look back at each sentence before them.

    Attributes:
        sentences: their texts.
        spans: their tokens [start, stop).
        heads: the heads, in order.
        attention: (heads, sentences, sentences) M[h, i, j]: the mean weight of a token of sentence
            i on a token of sentence j, the text's first token left out; 0 for j > i.

    Example:
        >>> links = interp.mechanics.sentence_links(model, "the cat saw the dog . " * 9)
        >>> links.received().shape, links.kurtosis().shape
        ((32, 5), (32,))
    """

    sentences: list[str]
    spans: list[tuple[int, int]]
    heads: list[Head]
    attention: np.ndarray

    def received(self, gap: int = GAP) -> np.ndarray:
        """(heads, sentences − gap): v_j, the mean of M[i, j] over the sentences i ≥ j + gap."""
        n = self.attention.shape[1]
        return np.stack([self.attention[:, j + gap :, j].mean(1) for j in range(n - gap)], 1)

    def kurtosis(self, gap: int = GAP) -> np.ndarray:
        """(heads,) Fisher's excess kurtosis of v over the sentences, NaN for a head whose v is the
        same for all: high where few sentences receive most."""
        v = self.received(gap)
        d = v - v.mean(1, keepdims=True)
        spread = (d**2).mean(1)
        uneven = spread > (1e-9 * np.abs(v).max(1)) ** 2  # else rounding
        return np.where(uneven, (d**4).mean(1) / np.where(uneven, spread, 1) ** 2 - 3, np.nan)


@torch.no_grad()
def sentence_links(model: Any, text: Any) -> SentenceLinks:
    """Each head's attention between the sentences of a text, from one forward, in O(L) memory.

    M[i, j] = mean over tokens q of sentence i and k of sentence j of A[q, k]. The text's first
    token is nobody's: as a sink it would make its sentence the one that all others look at.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        text: a text, a path to one, or token ids.

    Raises:
        InputError: fewer than eight sentences of at least three tokens.

    Example:
        >>> text = " ".join(["the cat saw the dog ."] * 9)
        >>> links = interp.mechanics.sentence_links(model, text)
        >>> links.attention.shape, len(links.sentences)
        ((32, 9, 9), 9)
    """
    from interp.loading import load

    model = load(model)
    ids, spans = _read(model, text)
    heads, n = main_heads(model), len(spans)
    of = torch.full((len(ids),), n)  # sentence of a token; n: the first one's, nobody's
    for i, (start, stop) in enumerate(spans):
        of[start:stop] = i
    of[0] = n
    sizes = torch.bincount(of, minlength=n + 1)[:n].clamp_min(1).double()
    sums = {
        s.layer: torch.zeros(s.n_heads, n + 1, n + 1, dtype=torch.float64)
        for s in model.sites
        if s.is_main
    }

    def take(call: AttentionCall, start: int, weights: torch.Tensor) -> None:
        a = weights[0].double().cpu()  # (heads, rows, columns)
        columns = torch.nn.functional.one_hot(of[: a.shape[2]], n + 1).double()
        by_key = a @ columns  # (heads, rows, sentences)
        sums[call.site.layer].index_add_(1, of[start : start + a.shape[1]], by_key)

    asked = Question(weights=WeightRows(take))
    # other towers and streams have tokens of their own
    main = SiteQuestion(choose=lambda site: asked if site.is_main else Question())
    with model.watch(main, lambda stats: None):
        forward(model, torch.tensor([ids]), keep=1)
    stacked = torch.cat([*sums.values()])[:, :n, :n]  # (heads, n, n)
    parts = pieces(model.tokenizer, ids)
    return SentenceLinks(
        ["".join(parts[a:b]).strip() for a, b in spans],
        spans,
        heads,
        (stacked / sizes[:, None] / sizes).numpy(),
    )


@torch.no_grad()
def sentence_effects(model: Any, text: Any) -> np.ndarray:
    """What each sentence matters to each later one: the causal twin of attention between them.

    Returns (sentences, sentences): the mean over the tokens of sentence i of ln KL(p ‖ p with
    sentence j hidden), NaN for i ≤ j. Sentence j is hidden from all heads of all layers, for all
    later tokens; one forward a sentence. The authors subtract each sentence's own mean over j
    before they compare, and so should you.

    Raises:
        InputError: fewer than eight sentences of at least three tokens.

    Example:
        >>> text = " ".join(["the cat saw the dog ."] * 8)
        >>> interp.mechanics.sentence_effects(model, text).shape
        (8, 8)
    """
    from interp.loading import load

    model = load(model)
    ids, spans = _read(model, text)
    given = torch.tensor([ids])
    before = logits_of(forward(model, given))[0].float().log_softmax(-1)  # (tokens, vocabulary)
    found = np.full((len(spans), len(spans)), np.nan)
    for j, (start, stop) in enumerate(spans[:-1]):
        # the tokens of j itself go on seeing it, and the first token stays in sight
        hidden = ScaleTokens(Span(max(start, 1), stop), 0.0, queries=(stop, None))
        with model.edit(hidden):
            after = logits_of(forward(model, given))[0].float().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1).clamp_min(1e-12).log()  # (tokens,)
        for i in range(j + 1, len(spans)):
            found[i, j] = float(kl[slice(*spans[i])].mean())
    return found


def check_sentences(model: Any, ids: Sequence[int]) -> list[tuple[int, int]]:
    """The tokens [start, stop) of a text's sentences. Raises `InputError` for too few."""
    spans = sentences(model.tokenizer, ids, TOKENS)
    if len(spans) < LEAST:
        raise InputError(
            f"A text of {len(ids)} tokens has {len(spans)} sentences of {TOKENS} tokens or more, "
            f"and links between sentences need {LEAST}; give a longer one."
        )
    return spans


def _read(model: Any, text: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens, and the sentences among them. Raises `InputError`."""
    ids = _ids(model, text)
    return ids, check_sentences(model, ids)


def _ids(model: Any, text: Any) -> list[int]:
    if isinstance(text, torch.Tensor):
        return [int(i) for i in text.flatten()]
    if isinstance(text, (list, tuple)):
        return [int(i) for i in text]
    reader = Text(model.tokenizer)
    return [*reader.bos, *reader.plain(content(text))]
