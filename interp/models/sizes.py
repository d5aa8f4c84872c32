"""How many heads a model has, by its configuration alone: told before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp.errors import InterpError


def heads_by_layer(target: str) -> dict[int, int]:
    """Layer → heads of the text of the model in a folder, or in the hub's cache under this name; {}
    where no folder of this machine says so, or its layers differ."""
    from interp.models.fetch import hub_folder

    try:
        folder = Path(target) if Path(target).is_dir() else hub_folder(target)
        config: Any = json.loads((Path(str(folder)) / "config.json").read_text(encoding="utf-8"))
    except (InterpError, OSError, ValueError):
        return {}  # told when it is loaded
    config = config.get("text_config", config)
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    plain = config.get("model_type") in UNIFORM and isinstance(layers, int)
    return dict.fromkeys(range(layers), heads) if plain and heads else {}


#: architectures whose layers are all alike, with one self-attention each
UNIFORM = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "olmo2", "smollm3")
