"""WAAD and FAI over tokens: the rhythm of local phrases and global anchors in a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.forward import forward
from interp.inputs.text import content
from interp.inputs.tokenizer import Text
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats
from interp_kernels import Received

if TYPE_CHECKING:
    import pandas as pd

SHARE, WINDOW, NEAR, FAR = 0.3, 10, 10, 50


@torch.no_grad()
def rhythm(model: Any, text: str | Path) -> pd.DataFrame:
    """WAAD and FAI of each token of a text: the rhythm of local and of global heads.

    Heads are ranked by mean attended distance; the lowest 30 % are local, the highest 30 % global,
    and each set's attention is averaged. WAAD_t = Σ_s Ā^loc[t,s]·min(t−s, 10); FAI_s =
    mean_{t∈[s+10, min(T, s+50)]} Ā^glob[t,s] (NaN-free: 0 where no such t exists). Li et al. 2025,
    "Attention Illuminates LLM Reasoning".

    Args:
        model: a `HookedModel`, or anything `interp.load` takes.
        text: a text, or a `Path` to one.

    Returns:
        A row a token: `token`, `waad` (tokens) and `fai`.

    Raises:
        InputError: a text of fewer than two tokens.

    Example:
        >>> interp.rhythm(model, "the dog saw the cat").columns.tolist()
        ['token', 'waad', 'fai']
    """
    import pandas as pd

    from interp.loading import load

    short = "The text has fewer than two tokens; give a longer one."
    if isinstance(text, str) and not text.strip():
        raise InputError(short)
    written = content(text)
    hooked = load(model)
    ids = Text(hooked.tokenizer).prompt(written)
    if len(ids) < 2:
        raise InputError(short)
    layers: list[LayerStats] = []
    names = frozenset({"distance", "capped_distance"})
    question = Question(names, received={"future": Received(band=(NEAR, FAR))}, cap=WINDOW)
    with hooked.watch(question, lambda stats: layers.append(stats)):
        forward(hooked, torch.tensor([ids]), keep=1)
    layers = [s for s in layers if s.site.kind == "self"]
    span = torch.cat([s.distance[0].mean(-1) for s in layers])  # (all heads,)
    capped = torch.cat([s.capped_distance[0] for s in layers])  # (all heads, tokens)
    future = torch.cat([s.received["future"][0] for s in layers])
    order, count = span.argsort(), max(1, round(SHARE * len(span)))
    return pd.DataFrame(
        dict(
            token=hooked.tokenizer.convert_ids_to_tokens(ids),
            waad=capped[order[:count]].mean(0).cpu().numpy(),
            fai=future[order[-count:]].mean(0).cpu().numpy(),
        )
    )
