"""How long a text a model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: scalings whose config keeps the length before them in max_position_embeddings, as transformers
#: asks for; in the others (llama3, longrope) that is the length after them
BEFORE = ("yarn", "linear", "dynamic")


def max_context(config: Any) -> int | None:
    """Positions that a text config allows for, scaled rotary ones included; None where it says
    none.

    YaRN, linear and dynamic scaling reach original × factor. Some configs hold that product in
    `max_position_embeddings` already (gpt-oss), others the length before it (Qwen 2.5): the longer
    one counts. Llama 3's scaling and LongRoPE always hold it.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    limit = int(limit)
    rope = _scaling(config)
    kind = rope.get("rope_type", rope.get("type"))
    factor = rope.get("factor")
    if kind not in BEFORE or not isinstance(factor, (int, float)):
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * factor))


def grows_with_length(config: Any, length: int) -> str:
    """The kind of rotary scaling whose angles change with the length of the text at hand, where
    `length` reaches that; "" where a token's angles are its own.

    Dynamic scaling does beyond the length trained on, LongRoPE beyond the original one.
    """
    text = getattr(config, "text_config", None) or config
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(text, name, None)
        if not isinstance(rope, Mapping):
            continue
        for one in (rope, *(v for v in rope.values() if isinstance(v, Mapping))):
            kind = one.get("rope_type", one.get("type"))
            limit = one.get("original_max_position_embeddings")
            limit = limit or getattr(text, "original_max_position_embeddings", None)
            limit = limit or getattr(text, "max_position_embeddings", None) or 0
            if kind in ("dynamic", "longrope") and length > limit:
                return str(kind)
    return ""


def _scaling(config: Any) -> Mapping[str, Any]:
    """The rotary parameters of all layers, or of those with full attention where kinds of layers
    have their own and these are YaRN's (Gemma 3 scales linearly inside its length)."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if not isinstance(rope, Mapping) or not rope:
            continue
        if "rope_type" in rope or "type" in rope:
            return rope
        full = rope.get("full_attention")
        if isinstance(full, Mapping) and full.get("rope_type") == "yarn":
            return full
    return {}
