"""A model's sizes, from its configuration alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp.errors import InputError, ModelError

#: bytes of a number
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Shape:
    """What of a model decides its cost.

    Attributes:
        name: of the model.
        heads: query heads of each layer's self-attention. kv_heads: key-value heads.
        d_head: dimension of a head. width: of the residual stream. d_mlp: of the MLP's inside.
        windows: of each layer, how many keys a query sees; None for all before it.
        parameters: all of them. products: those that every token is multiplied by (of experts,
            those that are chosen), embedding and unembedding left out.
        vocabulary: tokens that there are.
        positions: tokens that the model reads at most; None where the configuration does not say.
        dtype: of the checkpoint.
    """

    name: str
    heads: int
    kv_heads: int
    d_head: int
    width: int
    d_mlp: int
    windows: tuple[int | None, ...]
    parameters: int
    products: int
    vocabulary: int
    positions: int | None = None
    dtype: str = "bfloat16"

    @property
    def layers(self) -> int:
        return len(self.windows)

    def pairs(self, tokens: int) -> float:
        """Pairs of query and key over all layers and heads of one causal forward."""
        full = tokens * (tokens + 1) / 2
        inside = [
            full if w is None or w >= tokens else full - (tokens - w) * (tokens - w + 1) / 2
            for w in self.windows
        ]
        return self.heads * sum(inside)


def shape_of(source: str) -> Shape:
    """The sizes of a model: a name, a hub id (its config.json is fetched), a folder, or a
    config.json.

    Raises:
        ModelError: no such model, or a configuration that can't be had or read.
        InputError: a configuration that does not say how its attention is.

    Example:
        >>> from interp.costs.shape import shape_of
        >>> shape = shape_of("llama")
        >>> shape.layers, shape.heads, shape.d_head, shape.parameters
        (4, 8, 32, 1134592)
    """
    return of_config(*_config(source))


def of_config(config: Any, name: str) -> Shape:
    """The sizes that a configuration of transformers gives. Raises `InputError`, `ModelError`."""
    text = config.get_text_config(decoder=True)
    layers, heads = _number(text, "num_hidden_layers"), _number(text, "num_attention_heads")
    width = _number(text, "hidden_size")
    if not layers or not heads or not width:
        raise InputError(
            f"The configuration of {name} does not say how many layers and heads of what width it "
            "has, so its cost can't be told beforehand."
        )
    window = _number(text, "sliding_window")
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    if window and getattr(text, "layer_types", None) is None:
        kinds = ["sliding_attention"] * layers
    whole, products, vocabulary = _parameters(config, text, name)
    mlp = _number(text, "intermediate_size") or _number(text, "ffn_dim") or 4 * width
    return Shape(
        name,
        heads,
        _number(text, "num_key_value_heads") or heads,
        _number(text, "head_dim") or width // heads,
        width,
        mlp,
        tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers]),
        whole,
        products,
        vocabulary,
        _number(text, "max_position_embeddings"),
        str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    )


def _parameters(config: Any, text: Any, name: str) -> tuple[int, int, int]:
    """(parameters, those that a token is multiplied by, vocabulary) of a model that is built
    without memory for its weights."""
    import torch

    from interp.models.classes import class_of

    try:
        kind = class_of(config)
        build = getattr(kind, "from_config", None) or kind._from_config
        with torch.device("meta"):
            module = build(config)
    except (ValueError, RuntimeError, AttributeError, TypeError, ImportError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"The model of {name}'s configuration can't be built: {reason}") from error
    ends = {id(e.weight) for e in (module.get_input_embeddings(),) if e is not None}
    unembedding = module.get_output_embeddings()
    ends |= {id(unembedding.weight)} if unembedding is not None else set()
    experts = _number(text, "num_local_experts") or _number(text, "num_experts")
    used = (_number(text, "num_experts_per_tok") or 1) / experts if experts else 1.0
    whole = products = 0.0
    for key, weight in module.named_parameters():
        whole += weight.numel()
        if weight.ndim < 2 or id(weight) in ends:
            continue
        products += weight.numel() * (used if ".experts." in key else 1.0)
    return int(whole), int(products), int(getattr(text, "vocab_size", 0) or 0)


def _config(source: str) -> tuple[Any, str]:
    """A configuration of transformers, and the model's name."""
    import transformers

    from interp.loading import resolve
    from interp.models.drawing import draws

    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".json":
        target, name = str(path), path.resolve().parent.name
    else:
        found = resolve(source)
        target, name = found.target, found.name
        if found.gguf:
            raise ModelError(
                f"{name} is a GGUF file; give the config.json or the hub id of the same model."
            )
        if draws(target):
            raise ModelError(
                f"{name} draws pictures (diffusers), and what is planned is a scan of a model that "
                "reads text."
            )
    try:
        return transformers.AutoConfig.from_pretrained(target), name
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"The configuration of {name} can't be had ({reason}); give a folder or a config.json."
        ) from error


def _number(config: Any, name: str) -> int:
    """A whole number of a configuration; 0 where it has none."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
