"""How a model turns keys by position, measured: unit vectors are put in place of what the key
projections give, and the attention calls show what became of them.

With k' = R_p N(k) the key of a call at position p, N the norm of keys where there is one, the turn
against position 0 is T_p = R_p R_0⁻¹ = M_p M_0⁻¹, the columns of M_p what unit vectors become. T is
a group, T_{p+q} = T_p T_q, so the turns at powers of two give all others, as exactly as the model
itself computes its angles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from interp_hooks.errors import TapError
from interp_hooks.huggingface.context import grows_with_length
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats

#: largest difference between what two ways to the same turn give
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
#: powers of two that are measured at most: positions below a million
BITS = 20
#: those where a model takes no position ids, and reads as many tokens
READ = 5

_KNOWN: WeakKeyDictionary[torch.nn.Module, Rotations] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rotations:
    """The turns of a model's keys.

    Attributes:
        powers: layer → (bits, d_head, d_head) float64, T at 1, 2, 4, …; layers that turn nothing
            are left out.
        config: of the model, which says from what length its angles change.

    Example:
        >>> from interp_hooks.huggingface.rotations import rotations
        >>> turn = rotations(model).at(2, torch.tensor([0, 3]))
        >>> bool(torch.allclose(turn[0], torch.eye(32, dtype=turn.dtype)))
        True
        >>> bool(torch.allclose(turn[1] @ turn[1].T, torch.eye(32, dtype=turn.dtype), atol=1e-5))
        True
    """

    powers: dict[int, torch.Tensor]
    config: Any

    def at(self, layer: int, positions: torch.Tensor) -> torch.Tensor | None:
        """(n, d_head, d_head) float64: T at positions (n,) from 0; None where a layer turns
        nothing.

        Raises `TapError` where the model's angles change with the length of the text.
        """
        powers = self.powers.get(layer)
        if powers is None:
            return None
        last = int(positions.max()) if len(positions) else 0
        if kind := grows_with_length(self.config, last + 1):
            raise TapError(
                f"Position {last} is beyond the length at which this model's angles ({kind}) begin "
                "to change with the text, so how a key was turned is not known."
            )
        turned = torch.eye(powers.shape[1], dtype=powers.dtype).repeat(len(positions), 1, 1)
        power = powers[0]
        for bit in range(last.bit_length()):
            power = powers[bit] if bit < len(powers) else power @ power
            odd = (positions >> bit) & 1 == 1
            turned[odd] = turned[odd] @ power
        return turned

    @property
    def several_axes(self) -> bool:
        """Whether the tokens of pictures have positions of several axes."""
        text = getattr(self.config, "text_config", None) or self.config
        ropes = (getattr(text, name, None) for name in ("rope_parameters", "rope_scaling"))
        return any("mrope_section" in str(rope) for rope in ropes)


def rotations(model: Any) -> Rotations:
    """How a HuggingFace model turns its keys, in one short forward; measured once a model.

    Args:
        model: a `HookedModel`.

    Raises:
        TapError: queries and keys that are not shown, a key norm that loses a direction, or
            positions that are no rotation.
    """
    module = model.module
    if module not in _KNOWN:
        _KNOWN[module] = _measured(model)
    return _KNOWN[module]


@torch.no_grad()
def _measured(model: Any) -> Rotations:
    sites = [s for s in model.sites if s.is_main]
    places = _places(model)
    d = max(s.d_head for s in sites)
    rows = max(math.ceil(s.d_head / s.n_kv_heads) for s in sites)
    units = torch.eye(d)

    def unit(place: str, layer: int, tensor: torch.Tensor) -> torch.Tensor | None:
        if place != "k":
            return None
        heads, width = tensor.shape[2:]
        index = torch.arange(rows * heads).view(rows, heads) % width  # row r, head h: one vector
        own = units[:width, :width].to(tensor)[index.to(tensor.device)]
        return own[:, None].expand_as(tensor)  # at all tokens

    seen: dict[int, torch.Tensor] = {}

    def note(stats: LayerStats) -> None:
        key = None if stats.call is None else stats.call.key
        if stats.site.is_main and key is not None:
            width = key.shape[3]
            wide = key.double().cpu().transpose(0, 2)  # (tokens, kv_heads, rows, d)
            columns = wide.transpose(1, 2).flatten(1, 2)[:, :width]  # (tokens, d, d): rows are k'
            seen[stats.site.layer] = columns.transpose(1, 2)

    ids = model.short_rows(len(places))[:1].repeat(rows, 1)
    inputs: dict[str, Any] = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if "position_ids" in model.accepts:
        inputs["position_ids"] = torch.tensor([places]).repeat(rows, 1)
    if "use_cache" in model.accepts:
        inputs["use_cache"] = False
    with model.clean(), model.projections(unit), model.watch(Question(call=True), note):
        model(**inputs)
    if any(s.layer not in seen for s in sites):
        raise TapError(
            f"{model.name} does not show its keys, so how positions turn them can't be measured "
            "(TransformerLens models show the weights alone)."
        )
    dtype = next(iter(model.module.parameters())).dtype
    found = {s.layer: _powers(seen[s.layer], places, dtype, model.name) for s in sites}
    return Rotations({layer: p for layer, p in found.items() if p is not None}, model.module.config)


def _places(model: Any) -> list[int]:
    """0, the powers of two that are measured, and 3, 5, 6, by which they are checked."""
    limit = min(model.max_context or 1 << READ, 1 << BITS)
    if "position_ids" not in model.accepts:
        return list(range(min(limit, (1 << READ) + 1)))
    config = model.module.config
    powers = [1 << b for b in range(BITS)]
    known = [p for p in powers if p < limit and not grows_with_length(config, p + 1)]
    return sorted({0, *known, *(p for p in (3, 5, 6) if p < limit)})


def _powers(
    columns: torch.Tensor, places: Sequence[int], dtype: torch.dtype, name: str
) -> torch.Tensor | None:
    """(bits, d, d) turns at powers of two, of (places, d, d) what unit vectors became; None where
    nothing is turned. Raises `TapError`."""
    close, d = CLOSE.get(dtype, 3e-2), columns.shape[1]
    if not bool(torch.linalg.cond(columns[0]) < 1e3):
        raise TapError(
            f"The norm of keys of {name} takes a direction out of them, so how positions turn it "
            "can't be measured."
        )
    turned = columns @ torch.linalg.inv(columns[0])  # (places, d, d)
    eye = torch.eye(d, dtype=turned.dtype)
    if float((turned - eye).abs().max()) <= close:
        return None
    if dtype in (torch.float16, torch.bfloat16):  # the nearest rotations
        left, _, right = torch.linalg.svd(turned)
        nearest = left @ right
    else:
        nearest = turned
    by_place = dict(zip(places, nearest, strict=True))
    checks = [(3, 1, 2), (5, 1, 4), (6, 2, 4)]
    apart = [
        by_place[whole] - by_place[a] @ by_place[b] for whole, a, b in checks if whole in by_place
    ]
    apart += [turned @ turned.transpose(1, 2) - eye]
    if max(float(x.abs().max()) for x in apart) > close:
        raise TapError(
            f"What {name} does to keys by their position is no rotation, so it can't be undone and "
            "done again."
        )
    powers = [by_place[1 << b] for b in range(BITS) if 1 << b in by_place]
    return torch.stack(powers)
