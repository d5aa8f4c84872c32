"""What architectures call their modules: one table, which a user can extend for a model we don't
know.

Names are tried in order; those of `interp.load(model, layout=Layout(…))` come first.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

import torch

from interp_hooks.errors import TapError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Module names of a HuggingFace architecture, each a name or several.

    "" or () for those of the table.

    Inside an attention module:
        output_projection: concatenated heads → residual stream.
        query, key, value: one projection each.
        fused: one projection of all queries, then keys, then values.
        interleaved: one projection that holds q, k, v head by head (GPT-NeoX).
    Inside a block:
        middle_norm: reads the stream between attention and MLP; order matters, as some
            architectures have a norm of the same name on the branch.
    Inside the trunk:
        final_norm: before the unembedding.
        positions: the embedding of learned positions.
    In the path of a module:
        cross, encoder, vision: parts of a path that say so.

    Raises:
        TypeError: a value that is neither a name nor several.

    Example:
        >>> Layout(output_projection="wo").names("output_projection")[:2]
        ('wo', 'o_proj')
    """

    output_projection: str | Names = ()
    query: str | Names = ()
    key: str | Names = ()
    value: str | Names = ()
    fused: str | Names = ()
    interleaved: str | Names = ()
    middle_norm: str | Names = ()
    final_norm: str | Names = ()
    positions: str | Names = ()
    cross: str | Names = ()
    encoder: str | Names = ()
    vision: str | Names = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            names = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"{field.name} of a layout is a name or several, not {value!r}.")
            object.__setattr__(self, field.name, tuple(name for name in names if name))

    def names(self, what: str) -> Names:
        """The names to try for a field, the user's first."""
        return (*getattr(self, what), *TABLE[what])

    def find(self, module: torch.nn.Module, what: str) -> torch.nn.Module | None:
        """The submodule of `module` under the first name of a field that it has; None without."""
        for name in self.names(what):
            part: Any = module
            for step in name.split("."):
                part = getattr(part, step, None)
            if isinstance(part, torch.nn.Module):
                return part
        return None

    def named(self, path: str, what: str) -> bool:
        """Whether a module's path says that it is one of these ("vision", "cross")."""
        return any(name in path.lower() for name in self.names(what))


#: what architectures of transformers say
TABLE: dict[str, Names] = {
    "output_projection": (
        "o_proj",
        "out_proj",
        "c_proj",
        "dense",
        "wo",
        "proj",
        "output_projection.o_proj",
        "output.dense",  # beside the attention, in BERT
    ),
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "fused": ("c_attn", "qkv_proj", "Wqkv"),
    "interleaved": ("query_key_value",),
    # Gemma 2 also has a post_attention_layernorm, but there it is on the branch
    "middle_norm": (
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "ln_2",
        "ln2",
        "final_layer_norm",
    ),
    "final_norm": (
        "norm",
        "final_layernorm",
        "final_layer_norm",
        "ln_f",
        "final_norm",
        "layernorm",
        "embedding_norm",  # LFM2 calls its last norm so
    ),
    "positions": ("wpe", "embed_positions", "position_embeddings"),
    "cross": ("cross", "encoder_attn", "encdec", "x_attn"),
    "encoder": ("encoder",),
    "vision": ("vis",),
}


#: fields whose names are parts of a path
IN_PATHS = ("cross", "encoder", "vision")
#: the table as it is
DEFAULT = Layout()


def middle_norm(block: torch.nn.Module, layout: Layout) -> torch.nn.Module | None:
    """The submodule whose input is the stream after attention; None in parallel-attention and
    post-norm blocks."""
    if getattr(block, "use_parallel_residual", False) or not getattr(
        block, "do_layer_norm_before", True
    ):
        return None
    names = dict(block.named_children())
    if "post_feedforward_layernorm" in names and "pre_feedforward_layernorm" not in names:
        return names.get("mlp")  # OLMo2 normalises branches only: the MLP reads the stream itself
    return layout.find(block, "middle_norm")


def position_table(model: torch.nn.Module, layout: Layout) -> str | None:
    """The path of the embedding of learned positions; None in models without one."""
    for path, module in model.named_modules():
        named = path.rpartition(".")[2] in layout.names("positions")
        if named and isinstance(module, torch.nn.Embedding):
            return path
    return None


def check_names(model: torch.nn.Module, layout: Layout) -> None:
    """Raise `TapError` for a name of the user's that no module of the model has."""
    paths = [path for path, _ in model.named_modules()]
    last = {path.rpartition(".")[2] for path in paths}
    for field in fields(layout):
        for name in getattr(layout, field.name):
            in_path = field.name in IN_PATHS and any(name in path.lower() for path in paths)
            if name not in last and not in_path:
                near = difflib.get_close_matches(name, last, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise TapError(
                    f"The layout says {field.name}={name!r}, and no module of "
                    f"{type(model).__name__} is called so{hint}"
                )


def text_config(model: Any) -> Any:
    """The config of the language model inside (`model.config` itself for text models)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
