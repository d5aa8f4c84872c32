"""How fast a model runs here: seconds of a forward, of a decode step, or of what a score repeats,
from short timed runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError, InterpError
from interp.inputs.forward import forward
from interp.support.progress import timed
from interp_hooks.question import Question

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel

#: tokens of the timed runs
SHORT, LONG = 64, 256
#: tokens in the cache of the timed decode steps
CACHED = 32


class Pace:
    """Seconds of what a scan repeats; each kind is timed when it is first asked for.

    A run of L tokens takes a·L + b·L² seconds (attention is b), fitted to two lengths.

    Args:
        model: what runs.
        ids: (n,) tokens of a text, at least `LONG` or as many as the context has.
        names: row statistics that the scan asks for, which a watched forward is timed with.
    """

    def __init__(self, model: HookedModel, ids: torch.Tensor, names: frozenset[str] = frozenset()):
        self.model, self._ids = model, ids
        self._question = Question(names or frozenset({"entropy"}))
        self._fits: dict[str, tuple[float, float]] = {}
        self._step: float | None = None

    def plain(self, rows: int, length: int) -> float:
        """Seconds of a forward that nobody watches."""
        return self.of("plain", lambda ids: forward(self.model, ids, keep=1), rows, length)

    def watched(self, rows: int, length: int) -> float:
        """Seconds of a forward whose attention is measured."""
        return self.of("watched", self._watched, rows, length)

    def of(self, name: str, run: Callable[[torch.Tensor], Any], rows: int, length: int) -> float:
        """Seconds of `run` on (rows, length) tokens; `name`: under which its timing is kept."""
        if name not in self._fits:
            self._fits[name] = self._fit(run)
        base, slope = self._fits[name]
        return rows * length * (base + slope * length)

    def step(self) -> float:
        """Seconds of one watched decode step on a cache, or of a whole forward of a token where the
        model has none."""
        if self._step is None:
            ids = self._ids[None, :CACHED]
            cache: dict[str, Any] = {}
            if self.model.has_cache:
                out = forward(self.model, ids, keep=1, use_cache=True)
                cache = dict(past_key_values=out.past_key_values, use_cache=True)
            run = partial(self._watched, ids[:, -1:], **cache)
            self._step = min(timed(run) for _ in range(3))
        return self._step

    def _watched(self, ids: torch.Tensor, **more: Any) -> None:
        with self.model.watch(self._question, lambda stats: None):
            forward(self.model, ids, keep=1, **more)

    def _fit(self, run: Callable[[torch.Tensor], Any]) -> tuple[float, float]:
        """(a, b). The faster of two runs counts, as other work on the machine only slows them."""
        lengths = sorted({min(n, len(self._ids)) for n in (SHORT, LONG)})
        try:
            run(self._ids[None, : lengths[0]])  # the first run of a kind is slow
        except InterpError:
            raise
        except (AttributeError, TypeError, ValueError) as error:  # CLIP wants a picture beside it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.model.name} does not run on text alone: {reason}") from error
        each = [
            min(timed(partial(run, self._ids[None, :n])) for _ in range(2)) / n for n in lengths
        ]
        slope = max(0.0, (each[-1] - each[0]) / max(1, lengths[-1] - lengths[0]))
        return max(each[-1] - slope * lengths[-1], 0.3 * each[-1]), slope


class PicturePace(Pace):
    """`Pace` of a model that reads pictures alone: all of one size, so seconds are in proportion to
    the patches.

    Args:
        model: what runs.
        inputs: of a picture.
        slots: the tokens that it makes of the picture.
        names: as in `Pace`.
    """

    def __init__(
        self,
        model: HookedModel,
        inputs: Mapping[str, Any],
        slots: int,
        names: frozenset[str] = frozenset(),
    ):
        super().__init__(model, torch.zeros(0, dtype=torch.long), names)
        self._inputs, self._slots = inputs, slots

    def plain(self, rows: int, length: int) -> float:
        return self._seconds("plain", lambda: self.model(**self._inputs)) * rows * length

    def watched(self, rows: int, length: int) -> float:
        def run() -> None:
            with self.model.watch(self._question, lambda stats: None):
                self.model(**self._inputs)

        return self._seconds("watched", run) * rows * length

    def step(self) -> float:
        raise TypeError("A model that reads pictures alone takes no decode steps.")

    def _seconds(self, name: str, run: Callable[[], Any]) -> float:
        """Seconds of a run, a slot."""
        if name not in self._fits:
            run()  # the first run of a kind is slow
            self._fits[name] = (min(timed(run) for _ in range(2)) / self._slots, 0.0)
        return self._fits[name][0]
