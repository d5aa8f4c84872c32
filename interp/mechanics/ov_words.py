"""What heads write when they attend to chosen tokens, as logits of chosen tokens.

The token is taken as later layers see it: the stream after the first block of a prompt of that
token alone ("effective embedding", Gould et al. 2023, McDougall et al. 2023). Scales of norms,
which change no order, and biases are left out, and so is what other heads and MLPs add on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from interp.inputs import lexicon
from interp.inputs.tokenizer import Text
from interp.mechanics.ov_qk import after_first
from interp.mechanics.weights import folded, main_sites

if TYPE_CHECKING:
    from interp_hooks.call import Site
    from interp_hooks.model import HookedModel


@torch.no_grad()
def raised(
    model: HookedModel, ids: Sequence[int], outputs: Sequence[int] | None = None
) -> Iterator[tuple[Site, torch.Tensor]]:
    """Yields (site, (heads, tokens, outputs) logits that heads add when they attend to a token),
    layer by layer.

    logits = x V O · gain of the final norm · W_U, with x the stream after the first block; heads of
    the first layer read the embedding.

    Args:
        ids: the tokens attended to.
        outputs: the tokens whose logits are read; None for the whole vocabulary.

    Raises:
        TapError: weights, norms or vocabulary are not known.
    """
    vocabulary, norms = model.vocabulary(), model.norms()
    read = torch.tensor(list(ids), device=model.device)
    embedded, after = vocabulary.embed(read).float(), after_first(model, read).float()
    last, W_U = norms.final(), vocabulary.W_U
    W_U = W_U.float() if outputs is None else W_U[:, list(outputs)].float()
    sites = main_sites(model)
    for site in sites:
        layer = folded(model, site, norms)
        x = embedded if site is sites[0] else after  # (tokens, d_model)
        written = (x @ layer.V.float()) @ layer.O.float()  # (heads, tokens, d_model)
        if last is not None:
            written = (last.centred(written) * last.gain).float()
        yield site, vocabulary.logit_scale * (written @ W_U)


#: words that make a series
LEAST = 4


def ordered_words(text: Text) -> dict[str, list[int]]:
    """Series of words in an order, name → ids: days, months, numbers, places in a row and letters,
    each as far as its words are one token after a space; series of fewer than four are left out."""
    found = {}
    for name, words in lexicon.SERIES.items():
        encoded = [text.encode(f" {word}") for word in words]
        whole = [ids[0] for ids in encoded if len(ids) == 1]
        if len(whole) >= LEAST and _in_a_row(encoded):
            found[name] = whole
    return found


def _in_a_row(encoded: Sequence[Sequence[int]]) -> bool:
    """Whether the words of one token come before all others, so that each is the next one's
    predecessor."""
    single = [len(ids) == 1 for ids in encoded]
    return single == sorted(single, reverse=True)
