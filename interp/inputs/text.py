"""Token rows and forwards that treat every model alike: padding, positions, context limits, text
files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import ContextError, InputError
from interp.support.files import reason
from interp.tasks import language
from interp.tasks.task import Text

if TYPE_CHECKING:
    import torch

    from interp_hooks.protocol import Model


#: what libraries call the embedding of learned positions
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class Row:
    """A row of tokens: `input_ids` (1, tokens) and `attention_mask` or None."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def pad_id(tokenizer: Any) -> int:
    """A token to pad with; it is masked, so any valid id will do."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that no generator takes."""
    if seed < 0:
        raise InputError(f"A seed is a whole number, 0 or more, not {seed}.")


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids under left padding: the first real token stands at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def forward(
    model: Model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    keep: int | None = None,
    **more: Any,
) -> Any:
    """One forward. Pads are masked, positions start at the first real token; `keep`: logits of the
    last rows only."""
    inputs: dict[str, Any] = dict(input_ids=input_ids, **more)
    accepts = model.accepts
    if attention_mask is not None and not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask
        if "position_ids" in accepts and "position_ids" not in more:
            inputs["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
    if keep is not None and "logits_to_keep" in accepts:
        inputs["logits_to_keep"] = keep
    if "use_cache" in accepts and "use_cache" not in more:
        inputs["use_cache"] = False
    return model(**inputs)


def check_context(model: Model, context: int, extrapolate: bool = False) -> None:
    """Raise `ContextError` if `context` exceeds the model's positions and extrapolation was not
    asked for, or cannot be (learned positions end where the table ends)."""
    limit = model.max_context
    if limit is None or context <= limit:
        return
    if extrapolate and (table := learned_positions(model)) is not None:
        raise ContextError(
            f"{model.name} has learned positions for {limit} tokens ({table}) and {context} are "
            "needed; it can't be "
            "extrapolated, use a shorter context."
        )
    if not extrapolate:
        raise ContextError(
            f"{model.name} has positions for {limit} tokens and {context} are needed; use a "
            "context of at most "
            f"{limit}, or allow extrapolation (--extrapolate) to go beyond what it was trained for."
        )


def learned_positions(model: Model) -> str | None:
    """The name of the model's table of learned positions; None where positions are computed (RoPE,
    ALiBi) or none."""
    from torch import nn

    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            return name
    return None


def extrapolation(model: Model, context: int) -> dict[str, Any] | None:
    """What goes into the record of a run past the model's positions: lengths, their ratio and the
    kind of RoPE."""
    limit = model.max_context
    if limit is None or context <= limit:
        return None
    config = getattr(model.module, "config", None)
    rope = getattr(getattr(config, "text_config", config), "rope_parameters", None)
    return dict(
        context=context,
        positions=limit,
        factor=round(context / limit, 4),
        rope=dict(rope) if rope else None,
    )


def read_file(path: str | Path, what: str) -> str:
    """The content of `what` file, UTF-8. Raises `InputError` when it is missing or not text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except OSError as error:
        raise InputError(f"The {what} file {path} can't be read ({reason(error)}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} file {path} is not UTF-8 text.") from error


def read_text(path: str | Path) -> str:
    """A text file's content. Raises `InputError` when it is missing, not text, or empty."""
    text = read_file(path, "text")
    if not text.strip():
        raise InputError(f"The text file {path} is empty; give a file with some text.")
    return text


def rows_of_text(
    tokenizer: Any, text: str | None, context: int, samples: int, seed: int
) -> list[list[int]]:
    """`samples` rows of exactly `context` tokens, BOS first where the tokenizer has one.

    From `text` (random starts, wrapping around), else from the generated prose.
    """
    reader = Text(tokenizer)
    bos = reader.bos
    need = context - len(bos)
    source = None if text is None else reader.encode(text)
    if source is not None and len(source) < 2:
        raise InputError("The text has fewer than two tokens; give a longer one.")
    rows = []
    for i in range(samples):
        rng = np.random.default_rng([seed, i])
        if source is None:
            ids: list[int] = []
            while len(ids) < need:
                ids += reader.encode(
                    " " + " ".join(language.prose(rng, max(4, (need - len(ids)) // 8)))
                )
        else:
            start = int(rng.integers(len(source)))
            repeats = -(-(start + need) // len(source))
            ids = (source * (repeats + 1))[start : start + need]
        rows.append(bos + ids[:need])
    return rows


def text_rows(model: Model, path: Path, context: int, samples: int, seed: int) -> list[Row]:
    """Rows from a text file, ready for `forward`."""
    import torch

    rows = rows_of_text(model.tokenizer, read_text(path), context, samples, seed)
    return [Row(torch.tensor([r])) for r in rows]
