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
