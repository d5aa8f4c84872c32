"""The token ids of the prompt that a model reads, for edits that look for a text in it."""

from __future__ import annotations

import torch

#: what stands in padding
PADDING = -1


class PromptTokens:
    """Token ids of the prompt at hand, over forwards with a cache.

    A forward of several tokens reads prompt; one of one token on top of a cache is a step of
    generation, and what is generated is not part of the prompt. Without a cache every forward reads
    a prompt anew, what was generated so far included.

    Attributes:
        prompt: (batch, slots) int64, `PADDING` where there is no token; None where nothing is
            known of the tokens read (embeddings, or a prompt that was read before).
    """

    def __init__(self) -> None:
        self.prompt: torch.Tensor | None = None
        self._read: torch.Tensor | None = None  # the prompt and what was generated since

    def forget(self) -> None:
        """What comes next on top of the cache is on top of something unknown."""
        self.prompt = self._read = None

    def read(self, ids: torch.Tensor | None, before: int, real: torch.Tensor | None = None) -> None:
        """Note a forward.

        Args:
            ids: (batch, tokens); None for embeddings.
            before: slots that a cache holds already.
            real: (batch, slots) or (batch, tokens), 0 for padding; None where all are real.
        """
        if ids is None:
            self._read = None
            self.prompt = self.prompt if before else None
            return
        here, n = ids.detach().long(), ids.shape[1]
        if real is not None and real.ndim == 2:
            wide = real.shape[1] >= before + n  # static caches: wider than what is read
            part = real[:, before : before + n] if wide else real[:, -n:]
            here = here.masked_fill(~part.to(here.device).bool(), PADDING)
        if before:
            self._repeat(len(here))
            if self._read is None or self._read.shape[1] < before:
                self._read = None
                self.prompt = self.prompt if n == 1 else None
                return
            here = torch.cat([self._read[:, :before], here], 1)
        self._read = here
        if n > 1 or not before:
            self.prompt = here

    def _repeat(self, batch: int) -> None:
        """One row for each of a batch that was repeated since (beams); forgets one that does not
        fit."""
        known = self._read if self._read is not None else self.prompt
        if known is None or len(known) == batch:
            return
        if batch % len(known):
            self.forget()
            return
        times = batch // len(known)
        if self._read is not None:
            self._read = self._read.repeat_interleave(times, 0)
        if self.prompt is not None:
            self.prompt = self.prompt.repeat_interleave(times, 0)

    def copy(self) -> PromptTokens:
        """The same, apart from what is read from now on."""
        other = PromptTokens()
        other.prompt, other._read = self.prompt, self._read
        return other
