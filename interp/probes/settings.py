"""What a scan fixes for all probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp.inputs.text import rows_of_text
from interp.vision.pictures import Pictures


@dataclass(frozen=True)
class Settings:
    """What a scan fixes for all probes.

    Args:
        context: tokens of the text rows and the longest needle prompt.
        samples: rows or problems a probe.
        seed: of the rows and problems.
        text: what text rows are cut from; None for the English shipped here, or generated prose
            for a tokenizer that does not know English.
        images: a folder of pictures; None for rendered scenes.
        prompt: what is asked about each picture; None for the usual one.
        format: of needle prompts, as in `interp.tasks`; "auto": what the model understands best.
        haystack: a text that needles are hidden in, or the name of its file; None for the English
            shipped here.
        needle: a fact of one's own to hide, "The … is …".
        question: what asks for it; made of the needle if None.
        inputs: token ids of one's own as text rows; None for rows of text.
        force: keep scores of needles where the model can't do the task.
        words: what heads are drawn looking for in the pictures; None for what is drawn otherwise.
        chunk: tokens of a text that are read at a time; None for all in one forward.

    Example:
        >>> interp.probes.Settings(context=64).samples
        16
    """

    context: int = 1024
    samples: int = 16
    seed: int = 0
    text: str | None = None
    images: str | None = None
    prompt: str | None = None
    format: str = "auto"
    haystack: str | None = None
    needle: str | None = None
    question: str | None = None
    inputs: tuple[tuple[int, ...], ...] | None = None
    force: bool = False
    words: tuple[str, ...] | None = None
    chunk: int | None = None

    def rows(self, tokenizer: Any, context: int | None = None) -> list[list[int]]:
        """Rows of running text, of the scan's context or all of at most `context` tokens.

        Raises `InputError` where there is neither a tokenizer nor `inputs`.
        """
        if self.inputs is not None:
            length = None if context is None else min(context, *map(len, self.inputs))
            return [list(row[:length]) for row in self.inputs]
        return rows_of_text(tokenizer, self.text, context or self.context, self.samples, self.seed)

    @property
    def pictures(self) -> Pictures:
        """The pictures that image scores are measured on."""
        return Pictures(self.samples, self.seed, self.images, self.prompt)
