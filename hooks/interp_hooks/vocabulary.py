"""Where tokens enter and leave the residual stream: embedding and unembedding, checked on a short
input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from interp_hooks.activations import Residual
from interp_hooks.errors import TapError

#: largest difference, relative to the largest magnitude, that counts as equal
CLOSE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
#: logits (2, tokens, vocabulary) and the residual stream of one forward
Forward = tuple[torch.Tensor, Residual]
#: tokens a row of the check
TOKENS = 7


@dataclass(frozen=True)
class Embeddings:
    """The matrices as the library stores them: W_E (vocabulary, d_model), W_U (d_model,
    vocabulary), b_U or None; `softcap` of the logits or None."""

    W_E: torch.Tensor
    W_U: torch.Tensor
    b_U: torch.Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A token t enters the stream as `embed_scale` · W_E[t], plus what does not depend on it
    (learned positions).

    Logits are softcap(`logit_scale` · (final W_U) + b_U), `final` the output of the final norm and
    softcap(x) = c tanh(x / c) where the model has one. W_E (vocabulary, d_model), W_U (d_model,
    vocabulary), b_U (vocabulary,) or None, as the model stores them.
    """

    W_E: torch.Tensor
    W_U: torch.Tensor
    b_U: torch.Tensor | None = None
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(…, d_model) in the model's precision: what the tokens put into the stream."""
        return self.W_E[ids.to(self.W_E.device)] * self.embed_scale

    def linear(self, final: torch.Tensor) -> torch.Tensor:
        """(…, vocabulary): the logits before a softcap."""
        out = self.logit_scale * (final @ self.W_U.to(final))
        return out if self.b_U is None else out + self.b_U.to(out)

    def unembed(self, final: torch.Tensor) -> torch.Tensor:
        """(…, vocabulary): the logits of `final` (…, d_model)."""
        out = self.linear(final)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def _scale(a: torch.Tensor, b: torch.Tensor) -> float:
    """The least-squares s in b ≈ s·a; 1 where it is near that."""
    scale = float((a * b).sum() / a.square().sum().clamp_min(1e-300))
    return 1.0 if abs(scale - 1) < 1e-3 else scale


def _equal(a: torch.Tensor, b: torch.Tensor, close: float) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= close * float(
        b.abs().max().clamp_min(1e-30)
    )


@torch.no_grad()
def read(
    name: str, given: Embeddings, ids: torch.Tensor, run: Callable[[torch.Tensor], Forward]
) -> Vocabulary:
    """`given` with its scales, found and checked in one forward of `ids` (2, tokens), two rows that
    differ: `run(ids)` gives the logits and the residual stream of the model called `name`.

    Raises `TapError` where the stream does not start with W_E, or the logits are not what W_U makes
    of its end.
    """
    if given.W_E.shape[1] != given.W_U.shape[0]:
        raise TapError(
            f"The embedding of {name} has {given.W_E.shape[1]} dimensions and the "
            "unembedding takes "
            f"{given.W_U.shape[0]}: there is a projection between, which this toolkit does not "
            "follow."
        )
    logits, resid = run(ids)
    logits = logits.double()
    close = CLOSE.get(given.W_E.dtype, 2e-2)
    first = min((key[1] for key in resid if key[0] == "pre"), default=None)
    if first is None or "final" not in resid:
        raise TapError(f"{name} has no final norm or no blocks that this toolkit finds.")
    start, final = resid["pre", first].double(), resid["final"].double()
    # learned positions are the same in both rows, so the difference is the tokens' alone
    tokens = given.W_E[ids.to(given.W_E.device)].double()
    if not start.shape == tokens.shape == final.shape:
        raise TapError(f"The residual stream of {name} is not as wide as its token embedding.")
    apart = tokens[0] - tokens[1]
    embed_scale = _scale(apart, start[0] - start[1])
    if not _equal(embed_scale * apart, start[0] - start[1], close):
        raise TapError(
            f"The residual stream of {name} does not start with its token embedding (a norm "
            "or projection "
            "follows it), so its vocabulary is not known here."
        )
    linear = logits if given.b_U is None else logits - given.b_U.double()
    if given.softcap is not None:
        linear = given.softcap * torch.atanh((logits / given.softcap).clamp(-1 + 1e-9, 1 - 1e-9))
        linear = linear if given.b_U is None else linear - given.b_U.double()
    logit_scale = _scale(final @ given.W_U.double(), linear)
    vocabulary = Vocabulary(
        given.W_E, given.W_U, given.b_U, embed_scale, logit_scale, given.softcap
    )
    if not _equal(vocabulary.unembed(final), logits, close):
        raise TapError(
            f"The logits of {name} are not what its unembedding makes of the final residual "
            "stream (another "
            "layer stands between), so its vocabulary is not known here."
        )
    return vocabulary
