"""Rows of tokens from text: files and generated prose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.inputs import language
from interp.inputs.tokenizer import Text
from interp.support.files import reason

if TYPE_CHECKING:
    import torch

    from interp_hooks.protocol import Model


@dataclass(frozen=True)
class Row:
    """A row of tokens: `input_ids` (1, tokens) and `attention_mask` or None."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def check_seed(seed: int) -> None:
    """Raise `InputError` for a seed that no generator takes."""
    if seed < 0:
        raise InputError(f"A seed is a whole number, 0 or more, not {seed}.")


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
    """Rows of a text file, ready for `forward`.

    Args:
        model: the model; its tokenizer reads the text.
        path: the file.
        context: tokens of a row.
        samples: rows.
        seed: of where they start.

    Raises:
        InputError: a file that can't be read, or a text of fewer than two tokens.

    Example:
        >>> from pathlib import Path
        >>> path = Path("text.txt")
        >>> _ = path.write_text("the cat saw the dog . " * 40)
        >>> len(interp.inputs.text_rows(model, path, context=32, samples=2, seed=0))
        2
    """
    import torch

    rows = rows_of_text(model.tokenizer, read_text(path), context, samples, seed)
    return [Row(torch.tensor([r])) for r in rows]
