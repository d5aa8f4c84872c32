"""What `generate` does with a batch while a model is tapped: samples repeated, and samples at their
end.

transformers feeds padding on for samples that have ended, repeats the prompt's samples for beams
and `num_return_sequences`, and reads drafts that it may reject. None of this shows in a forward's
inputs, so it is taken from `generate`'s own helpers, wrapped on the model while a block is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.errors import TapError
from interp_hooks.own_methods import wrapped

#: helpers of `generate` that are wrapped, and the method here that does it
_HELPERS = {
    "generate": "_generate",
    "_expand_inputs_for_generation": "_expand",
    "_get_stopping_criteria": "_criteria",
    "_check_early_stop_heuristic": "_early",
    "_update_finished_beams": "_finished",
    "_validate_generation_mode": "_mode",
    "_valid_auto_compile_criteria": "_compiled",
}


class Generation:
    """Follows the texts that a model generates.

    Attributes:
        copies: rows of the batch for each sample of the prompt.
        ends: (batch,) int64, the slot from which on a row's tokens no longer belong to its text;
            None while no text has ended.
    """

    def __init__(self, recording: Callable[[], bool]) -> None:
        self._recording = recording  # whether somebody listens
        self._depth = 0
        self._beams = False
        self.reset()

    def reset(self) -> None:
        """What comes next belongs to no text of `generate`."""
        self.copies: int = 1
        self.ends: torch.Tensor | None = None
        self._next = 0  # the slot after the last that was read
        self._first: Site | None = None  # whose calls begin a forward

    @contextmanager
    def watching(self, root: torch.nn.Module) -> Iterator[None]:
        """The helpers of every part of `root` that can generate are wrapped in this block."""
        with ExitStack() as stack:
            for part in root.modules():
                if not hasattr(type(part), "_get_stopping_criteria"):
                    continue
                for name, wrap in _HELPERS.items():
                    own = getattr(part, name, None)
                    if own is not None:
                        stack.enter_context(wrapped(part, name, getattr(self, wrap)(own)))
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forwards in this block are none of the texts' that are generated."""
        outer = self._depth, self.copies, self.ends, self._next, self._first
        self._depth = 0
        self.reset()
        try:
            yield
        finally:
            self._depth, self.copies, self.ends, self._next, self._first = outer

    def call(self, call: AttentionCall) -> AttentionCall:
        """A main tower's call, with rows after a text's end not counted as real."""
        if not self._depth:
            return call
        mask, n = call.mask, call.n_queries
        if call.site.kind == "self":
            self._first = self._first or call.site
            if call.site == self._first:
                self._check(mask.q_start, n)
        if self.copies > 1 and call.batch % self.copies == 0:
            call = replace(call, copies=self.copies)
        ends = self.ends
        if ends is None or len(ends) != call.batch:
            return call
        slots = torch.arange(mask.q_start, mask.q_start + n, device=call.value.device)
        running = slots < ends.to(slots.device)[:, None]  # (batch, queries)
        rows = running if mask.queries is None else mask.queries.to(slots.device).bool() & running
        return replace(call, mask=replace(mask, queries=rows))

    def _check(self, start: int, n: int) -> None:
        """Raise `TapError` where a recorded text is taken back: its next rows come again."""
        if self._recording() and 0 < start < self._next:
            raise TapError(
                f"This way of generating goes back to slot {start} after slot {self._next - 1} was "
                "read (drafts that were rejected), so its rows can't be recorded as one text; "
                "generate first, then observe a forward of the text."
            )
        self._next = start + n

    def _end(self, ended: torch.Tensor) -> None:
        """Note which rows (batch,) bool have ended with the token that was just chosen: it, and
        what is fed after it, is not read as text."""
        if self.ends is None or len(self.ends) != len(ended):
            self.ends = torch.full((len(ended),), torch.iinfo(torch.int64).max)
        now = torch.full_like(self.ends, self._next)
        self.ends = torch.where(
            ended.detach().cpu().bool(), torch.minimum(self.ends, now), self.ends
        )

    # --- the wrapped helpers

    def _generate(self, own: Any) -> Callable[..., Any]:
        @wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                self.reset()
            self._depth += 1
            try:
                return own(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.reset()

        return generate

    def _expand(self, own: Any) -> Callable[..., Any]:
        def expand(*args: Any, **kwargs: Any) -> Any:
            size = kwargs.get("expand_size", args[0] if args else 1)
            self.copies = int(size)
            return own(*args, **kwargs)

        return expand

    def _criteria(self, own: Any) -> Callable[..., Any]:
        def criteria(*args: Any, **kwargs: Any) -> Any:
            found = own(*args, **kwargs)
            # a new text begins, also where one generate writes several (long audio)
            self.ends, self._next = None, 0

            class Told(type(found)):  # type: ignore[misc]
                """The list itself, whose answers are noted."""

                def __call__(told, ids: Any, scores: Any, **more: Any) -> Any:
                    ended = super().__call__(ids, scores, **more)
                    if not self._beams and isinstance(ended, torch.Tensor):
                        self._end(ended)
                    return ended

            return Told(found)

        return criteria

    def _early(self, own: Any) -> Callable[..., Any]:
        def early(*args: Any, **kwargs: Any) -> Any:
            open_still = own(*args, **kwargs)  # (samples, 1) bool
            self._ended_search(~open_still[:, 0].bool())
            return open_still

        return early

    def _finished(self, own: Any) -> Callable[..., Any]:
        def finished(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            if kwargs.get("early_stopping") is True:
                self._ended_search(out[-1].all(-1))
            return out

        return finished

    def _ended_search(self, samples: torch.Tensor) -> None:
        """Note which samples' search for the best text is over."""
        if bool(samples.any()):
            self._end(samples.repeat_interleave(max(1, self.copies), 0))

    def _mode(self, own: Any) -> Callable[..., Any]:
        def mode(how: Any, *args: Any, **kwargs: Any) -> Any:
            self._beams = "beam" in how.value
            if "assisted" in how.value and self._recording():
                raise TapError(
                    "Assisted decoding reads drafts that it may reject, so rows can't be recorded "
                    "as one text; generate without assistant_model= and prompt_lookup_num_tokens= "
                    "inside the block, or generate first and observe a forward of the text."
                )
            return own(how, *args, **kwargs)

        return mode

    def _compiled(self, own: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: False  # a compiled step does not call the tap
