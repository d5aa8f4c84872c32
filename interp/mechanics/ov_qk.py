"""OV and QK circuits: what a head writes when it attends to a token, and which tokens it attends
to.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", section "Detecting copying
behavior". With rows as vectors, W_OV = W_V W_O and W_QK = W_Q W_Kᵀ (d_model × d_model). The full OV
circuit W_E W_OV W_U (vocabulary × vocabulary) says how attending to a token changes every logit;
the full QK circuit W_E W_QK W_Eᵀ how much each query token looks at each key token. Norm gains are
folded in; what depends on more than the two tokens is left out: scales of norms, positions (RoPE,
learned), query/key norms, biases, and what other heads and MLPs add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.one_token import token_id
from interp.mechanics.weights import Folded, folded, head_rows, main_sites, through_vocabulary
from interp.support.progress import timed
from interp_hooks.heads import Head

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from interp_hooks import HookedModel
    from interp_hooks.norms import Norms
    from interp_hooks.vocabulary import Vocabulary

#: tokens of the vocabulary that `copy_rank` is measured on
SAMPLE = 200
#: tokens of the vocabulary that are timed
PART = 4096


def ov_eigenvalues(model: Any, head: str | Head | Sequence[int], full: bool = True) -> np.ndarray:
    """Eigenvalues of a head's OV circuit W_E W_V W_O W_U, (d_head,) complex, largest first.

    By magnitude; those that are not zero by rank, computed as those of the d_head × d_head matrix
    W_O W_U W_E W_V, in float64.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        head: in any spelling.
        full: False: of W_V W_O, the map from stream to stream.

    Raises:
        HeadError: no such head.
        TapError: weights, norms or vocabulary are not known.

    Example:
        >>> values = interp.mechanics.ov_eigenvalues(model, "L2H3")
        >>> values.shape, bool(abs(values[0]) >= abs(values[-1]))
        ((32,), True)
    """
    hooked, target, norms, layer = _head(model, head)
    middle = through_vocabulary(hooked.vocabulary(), norms)[0] if full else None
    return _numbers(_ov(layer, middle)[target.head])


def qk_eigenvalues(model: Any, head: str | Head | Sequence[int], full: bool = True) -> np.ndarray:
    """Eigenvalues of a head's QK circuit W_E W_Q W_Kᵀ W_Eᵀ, (d_head,) complex, largest first.

    Args:
        model, head: as in `ov_eigenvalues`.
        full: False: of W_Q W_Kᵀ.

    Raises:
        HeadError, TapError: as `ov_eigenvalues`.

    Example:
        >>> interp.mechanics.qk_eigenvalues(model, "L2H3").shape
        (32,)
    """
    hooked, target, norms, layer = _head(model, head)
    middle = through_vocabulary(hooked.vocabulary(), norms)[1] if full else None
    return _numbers(_qk(layer, middle)[target.head])


def positive_share(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Σλ / Σ|λ| over the last dimension, in [−1, 1]; NaN where all are zero. The sum is real:
    eigenvalues of a real matrix are real or come in conjugate pairs."""
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


def copying_of(model: HookedModel) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """layer → ((heads,) Σλ/Σ|λ| of the full OV circuit, the same of the full QK circuit). Raises
    `TapError`."""
    norms = model.norms()
    through = through_vocabulary(model.vocabulary(), norms)
    return {s.layer: _shares(folded(model, s, norms), *through) for s in main_sites(model)}


def seconds_of_copying(model: HookedModel) -> float:
    """How long `copying_of` takes: a part of the vocabulary and one layer are timed. Raises
    `TapError`."""
    vocabulary, norms, site = model.vocabulary(), model.norms(), main_sites(model)[0]
    size, width = vocabulary.W_E.shape
    part = min(PART, size)
    some = replace(vocabulary, W_E=vocabulary.W_E[:part], W_U=vocabulary.W_U[:, :part])
    through = torch.eye(width, dtype=torch.float64, device=vocabulary.W_E.device)
    each = timed(lambda: _shares(folded(model, site, norms), through, through))
    return timed(lambda: through_vocabulary(some, norms)) * size / part + each * model.n_layers


def seconds_of_folding(model: HookedModel) -> float:
    """How long it takes to fold the norms into all layers' weights: one is timed. Raises
    `TapError`."""
    norms, site = model.norms(), main_sites(model)[0]
    return timed(lambda: folded(model, site, norms)) * model.n_layers


def _shares(
    layer: Folded, unembed_embed: torch.Tensor, embed_embed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads,) Σλ/Σ|λ| of a layer's OV and QK circuits."""
    return positive_share(_ov(layer, unembed_embed)), positive_share(_qk(layer, embed_embed))


@torch.no_grad()
def copying(
    model: Any,
    k: int = 5,
    tokens: Sequence[int] | None = None,
    after_mlp: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Copying scores of every head from its OV and QK circuits.

    * `ov_copying` = Σλ/Σ|λ| of W_E W_V W_O W_U: near 1 the head raises the tokens it attends to,
      near −1 lowers them;
    * `qk_matching` = the same of W_E W_Q W_Kᵀ W_Eᵀ: near 1 it attends to tokens like the query's;
    * `copy_rank`: the share of `tokens` that are among the `k` which their own row of the OV
      circuit raises most.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        k: how many of the raised tokens count.
        tokens: ids; by default 200 drawn from the vocabulary, without special tokens. Wang et al.
            take people's names.
        after_mlp: for `copy_rank`, put in the stream after the first block of a prompt of that
            token alone instead of W_E, the norm exact, as Wang et al. 2022, section 3.1 and
            appendix, do for GPT-2.
        seed: of the draw.

    Returns:
        A row a head, with the columns of an atlas (`tower`, `kind`, `layer`, `head`, `kv_head`) and
        the three.

    Raises:
        TapError: embedding, unembedding, head weights or norms are not known.
        InputError: bad `k` or `tokens`.

    Example:
        >>> frame = interp.mechanics.copying(model)
        >>> len(frame), bool(frame["ov_copying"].abs().max() <= 1)
        (32, True)
    """
    from interp.loading import load

    hooked = load(model)
    vocabulary, norms = hooked.vocabulary(), hooked.norms()
    ids = _drawn(hooked, tokens, k, vocabulary.W_U.shape[1], seed)
    stream = after_first(hooked, ids) if after_mlp else None
    values = copying_of(hooked)
    frame = head_rows(hooked)
    ranks = []
    for site in main_sites(hooked):
        layer, before = folded(hooked, site, norms), norms.attention(site.layer)
        source = vocabulary.embed(ids).double()  # (tokens, d_model)
        if stream is not None:  # the norm's gain is in V, so only its scale is missing
            scale = 1.0 if before is None else before.frozen(stream).scale.double()
            source = stream.double() * scale
        for head in range(site.n_heads):
            logits = _raised(layer, head, source, vocabulary, norms)  # (tokens, vocabulary)
            own = logits.gather(1, ids[:, None])
            ranks.append(float(((logits > own).sum(1) < k).double().mean()))
    frame["ov_copying"] = torch.cat([ov for ov, _ in values.values()]).tolist()
    frame["qk_matching"] = torch.cat([qk for _, qk in values.values()]).tolist()
    frame["copy_rank"] = ranks
    return frame


@torch.no_grad()
def ov_top_tokens(
    model: Any,
    head: str | Head | Sequence[int],
    tokens: Sequence[int | str],
    k: int = 10,
    lowest: bool = False,
) -> pd.DataFrame:
    """The output tokens that attending to a token raises most, by a head's OV circuit.

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        head: in any spelling.
        tokens: the tokens attended to, ids or texts of one token.
        k: how many outputs.
        lowest: what it lowers most instead.

    Returns:
        Columns `token`, `rank` (from 1), `output`, `value`, and `token_text`, `output_text` where
        there is a tokenizer. `value` is the entry of W_E W_V W_O W_U, in logits up to the norms'
        scales.

    Raises:
        HeadError: no such head.
        TapError: weights, norms or vocabulary are not known.
        InputError: a text of several tokens.

    Example:
        >>> frame = interp.mechanics.ov_top_tokens(model, "L2H3", [20, 30], k=2)
        >>> frame["rank"].tolist()
        [1, 2, 1, 2]
    """
    import pandas as pd

    hooked, target, norms, layer = _head(model, head)
    vocabulary = hooked.vocabulary()
    size = vocabulary.W_U.shape[1]
    if not 1 <= k <= size:
        raise InputError(f"k is between 1 and the {size} tokens of the vocabulary, not {k}.")
    ids = torch.tensor([token_id(hooked, t, size) for t in tokens], device=vocabulary.W_E.device)
    if not len(ids):
        raise InputError("No token was named; give ids, or words of one token each.")
    logits = _raised(layer, target.head, vocabulary.embed(ids).double(), vocabulary, norms)
    best = logits.topk(k, dim=1, largest=not lowest)
    rows = [
        dict(token=int(token), rank=i + 1, output=output, value=value)
        for token, outputs, values in zip(
            ids, best.indices.tolist(), best.values.tolist(), strict=True
        )
        for i, (output, value) in enumerate(zip(outputs, values, strict=True))
    ]
    frame = pd.DataFrame(rows)
    if hooked.tokenizer is not None:
        for column in ("token", "output"):
            frame[f"{column}_text"] = [hooked.tokenizer.decode([t]) for t in frame[column]]
    return frame


def _head(model: Any, head: str | Head | Sequence[int]) -> tuple[HookedModel, Head, Norms, Folded]:
    from interp.loading import load

    hooked = load(model)
    target = hooked.check(Head.parse(head))
    site = next((s for s in main_sites(hooked) if s.layer == target.layer), None)
    if site is None or target.tower not in ("", site.tower):
        raise InputError(f"{target} is no head of the tower that reads and writes tokens.")
    norms = hooked.norms()
    return hooked, target, norms, folded(hooked, site, norms)


@torch.no_grad()
def _ov(layer: Folded, middle: torch.Tensor | None) -> torch.Tensor:
    """(heads, d_head) eigenvalues of O M V, M = W_U W_E or nothing."""
    inner = layer.V if middle is None else middle @ layer.V  # (heads, d_model, d_head)
    return torch.linalg.eigvals(layer.O @ inner)


@torch.no_grad()
def _qk(layer: Folded, middle: torch.Tensor | None) -> torch.Tensor:
    """(heads, d_head) eigenvalues of Kᵀ M Q, M = W_Eᵀ W_E or nothing."""
    inner = layer.Q if middle is None else middle @ layer.Q
    return torch.linalg.eigvals(layer.K.transpose(1, 2) @ inner)


def _numbers(eigenvalues: torch.Tensor) -> np.ndarray:
    return eigenvalues[eigenvalues.abs().argsort(descending=True)].cpu().numpy()


def _raised(
    layer: Folded, head: int, source: torch.Tensor, vocabulary: Vocabulary, norms: Norms
) -> torch.Tensor:
    """(tokens, vocabulary): source V O, through the final norm's gain and W_U; biases left out."""
    written = source @ layer.V[head] @ layer.O[head]  # (tokens, d_model)
    last = norms.final()
    if last is not None:
        written = last.centred(written) * last.gain
    scale = vocabulary.logit_scale
    # by pieces, since a float64 copy of the unembedding may be large
    return scale * torch.cat(
        [written @ piece.double() for piece in vocabulary.W_U.split(8192, dim=1)], 1
    )


def _drawn(
    model: HookedModel, tokens: Sequence[int] | None, k: int, size: int, seed: int
) -> torch.Tensor:
    """(tokens,) ids to measure `copy_rank` on."""
    if not 1 <= k <= size:
        raise InputError(f"k is between 1 and the {size} tokens of the vocabulary, not {k}.")
    if tokens is None:
        return drawn(model, SAMPLE, seed)
    bad = [t for t in tokens if not 0 <= int(t) < size]
    if bad or not len(tokens):
        raise InputError(
            f"There is no token {bad[0]}: ids go from 0 to {size - 1}."
            if bad
            else "No token was given."
        )
    return torch.tensor([int(t) for t in tokens], device=model.device)


def drawn(model: HookedModel, n: int, seed: int) -> torch.Tensor:
    """(n or all,) ids of tokens drawn from the vocabulary, in order, without special tokens."""
    import numpy as np

    size = model.vocabulary().W_U.shape[1]
    special = set(getattr(model.tokenizer, "all_special_ids", ()) or ())
    ordinary = np.array([t for t in range(size) if t not in special])
    if model.tokenizer is not None:  # an unembedding may be wider than the vocabulary
        ordinary = ordinary[ordinary < len(model.tokenizer)]
    draw = np.random.default_rng(seed)
    tokens = sorted(draw.choice(ordinary, min(n, len(ordinary)), replace=False).tolist())
    return torch.tensor(tokens, device=model.device)


@torch.no_grad()
def after_first(model: HookedModel, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, d_model): the stream after the first block, of prompts of one token."""
    first = main_sites(model)[0].layer
    with model.capture_resid() as resid:
        model.logits(ids[:, None])
    return resid["post", first][:, 0]
