"""Rows of tokens from text: files, the English shipped here, code, and generated prose."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.inputs import english, language, source_code
from interp.inputs.tokenizer import Text
from interp.support.files import reason
from interp_hooks.whole_numbers import quoted, whole

if TYPE_CHECKING:
    import torch

    from interp_hooks.protocol import Model


#: what people call files, or where they look for them; a text of one word may have a slash
_NAMES_FILE = re.compile(
    r"(\S+|.*[/\\].*)\.(txt|text|md|rst|csv|tsv|jsonl?|html?|xml|ya?ml|py|tex|log|pdf|docx?|gz)"
    r"|(/|\./|\.\./|~/|[A-Za-z]:\\)\S+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """A row of tokens: `input_ids` (1, tokens) and `attention_mask` or None."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def check_seed(seed: Any) -> None:
    """Raise `InputError` for a seed that no generator takes."""
    number = whole(seed)
    if number is None or number < 0:
        raise InputError(f"A seed is a whole number, 0 or more, not {quoted(seed)}.")


def read_file(path: str | Path, what: str) -> str:
    """The content of `what` file, UTF-8. Raises `InputError` when it is missing or not text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
    except OSError as error:
        raise InputError(f"The {what} file {path} can't be read ({reason(error)}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} file {path} is not UTF-8 text.") from error


def content(text: str | os.PathLike[str], what: str = "text") -> str:
    """A text itself, or what is in a file: of a `Path`, or of a string that names a file.

    Every `text=` and `haystack=` is read so.

    Args:
        text: the text, a `Path`, or the name of a file that is there.
        what: what it is called in errors.

    Raises:
        InputError: no text and no path, an empty text, a file that can't be read, and a string that
            looks like the name of a file which is not there ("notes.txt", "./notes").

    Example:
        >>> from pathlib import Path
        >>> from interp.inputs.text import content
        >>> _ = Path("notes.txt").write_text("the cat saw the dog")
        >>> content(Path("notes.txt")) == content("notes.txt") == content("the cat saw the dog")
        True
    """
    file = file_of(text, what)
    said = text if file is None else read_file(file, what)
    assert isinstance(said, str)
    if not said.strip():
        begins = f"The {what}" if file is None else f"The {what} file {file}"
        end = "some text, or a Path to a file" if file is None else "a file"
        raise InputError(f"{begins} is empty; give {end} with some{' text' * (file is not None)}.")
    return said


def file_of(text: Any, what: str = "text") -> Path | None:
    """The file that `text` is or names, see `content`; None for a text itself. Raises
    `InputError`."""
    if isinstance(text, os.PathLike):
        return Path(text).expanduser()
    if not isinstance(text, str):
        raise InputError(
            f'{what}= takes a text, or a Path to a file of one, like Path("notes.txt"), and not '
            f"{quoted(text)}."
        )
    if len(text) >= 1000 or "\n" in text or not text.strip():
        return None
    try:
        path = Path(text).expanduser()
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # no name of a file
        return None
    if _NAMES_FILE.fullmatch(text):
        raise InputError(
            f"There is no {what} file {text}, so it can't be read; give one that is there, or the "
            "text itself (one that only looks like a file, with a line break at its end)."
        )
    return None


def named(text: str | os.PathLike[str]) -> str:
    """A text as a record names it: by its file, or by its first words and its length."""
    file = file_of(text)
    return str(file) if file is not None else f"{str(text)[:40]!r}, {len(str(text)):,} characters"


def rows_of_text(
    tokenizer: Any, text: str | None, context: int, samples: int, seed: int
) -> list[list[int]]:
    """`samples` rows of exactly `context` tokens, BOS first where the tokenizer has one.

    From `text` (random starts, wrapping around), else natural English, passages in an order drawn
    by (seed, row), or generated prose for a tokenizer that does not know English.

    Raises `InputError` for a text of fewer than two tokens, and where English runs out.
    """
    reader = Text(tokenizer)
    bos = reader.bos
    need = context - len(bos)
    source = None if text is None else reader.plain(text)
    if source is not None and len(source) < 2:
        raise InputError("The text has fewer than two tokens; give a longer one.")
    rows = []
    for i in range(samples):
        rng = np.random.default_rng([seed, i])
        if source is not None:
            start = int(rng.integers(len(source)))
            repeats = -(-(start + need) // len(source))
            ids = (source * (repeats + 1))[start : start + need]
        elif reader.natural:
            ids = _joined(reader, english.shuffled(rng), need)
        else:
            ids = []
            while len(ids) < need:
                ids += reader.encode(
                    " " + " ".join(language.prose(rng, max(4, (need - len(ids)) // 8)))
                )
        rows.append(bos + ids[:need])
    return rows


def code_rows(tokenizer: Any, context: int, samples: int, seed: int) -> list[list[int]]:
    """`samples` rows of `context` tokens of code: the standard library's own, or generated lines
    for a tokenizer that does not know English."""
    reader = Text(tokenizer)
    bos = reader.bos
    rows = []
    for i in range(samples):
        rng = np.random.default_rng([seed, i, 1])
        if reader.natural:
            rows.append(bos + _joined(reader, source_code.sources(rng), context - len(bos)))
        else:
            lines = language.code(rng, context)
            rows.append(bos + rows_of_text(tokenizer, lines, context, 1, seed)[0][len(bos) :])
    return rows


def _joined(reader: Text, texts: Iterable[str], need: int) -> list[int]:
    """The first `need` tokens of the texts, a blank line between them. Raises `InputError` where
    they are too few."""
    ids: list[int] = []
    for text in texts:
        ids += reader.encode("\n\n" + text) if ids else reader.plain(text)
        if len(ids) >= need:
            return ids[:need]
    raise InputError(
        f"The English that comes with the toolkit is {len(ids):,} tokens for this tokenizer and "
        f"{need:,} are needed; give a longer text with --text FILE (text=)."
    )


def text_rows(
    model: Model, path: str | os.PathLike[str], context: int, samples: int, seed: int
) -> list[Row]:
    """Rows of a text, ready for `forward`.

    Args:
        model: the model; its tokenizer reads the text.
        path: a text, or a `Path` to one.
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

    rows = rows_of_text(model.tokenizer, content(path), context, samples, seed)
    return [Row(torch.tensor([r])) for r in rows]
