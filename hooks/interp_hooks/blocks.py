"""The blocks that are open on a model: who listens, what is edited, in which thread.

Every handle on the same attention modules shares one `Tap`, so that the edits of one act in the
blocks of the other. A block is an entry of its tap, taken out by identity when it ends, so that
blocks may end in any order and nothing of one stays behind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.edit import CallEdit
from interp_hooks.errors import TapError
from interp_hooks.question import Question
from interp_hooks.recording import LayerStats


@dataclass(frozen=True)
class Observer:
    """A question, when it is asked ("before" or "after" edits), and who gets each layer's
    answer."""

    question: Question
    callback: Callable[[LayerStats], None]
    stage: str = "before"


@dataclass(eq=False)
class Block:
    """One block of a handle: its observers and edits, on top of those of the blocks before it.

    Attributes:
        observers, edits: what it adds.
        clean: whether the blocks before it are suspended.
        backend: says which kernels run; None for those of the blocks before.
        holding: whether a cache holds keys that only the tap can attend to.
    """

    observers: Sequence[Observer] = ()
    edits: Sequence[CallEdit] = ()
    clean: bool = False
    backend: Callable[[], str] | None = None
    holding: bool = False

    @property
    def active(self) -> bool:
        """Whether it needs the tap in place."""
        return bool(self.observers or self.edits or self.holding)


class Tap:
    """What happens at a model's attention calls now: who listens, what is edited, which kernels
    run.

    Adapters are given this and nothing else of the handles that own it.

    Args:
        observers, edits, backend: of a tap for one call or one forward; the tap of a model starts
            without any and gets them from the blocks that are open.
    """

    def __init__(
        self,
        observers: Sequence[Observer] = (),
        edits: Sequence[CallEdit] = (),
        backend: str = "auto",
    ) -> None:
        own = Block(observers, edits, backend=lambda: backend)
        self.blocks = [own] if own.active or backend != "auto" else []
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread whose blocks are open
        self._installed: ExitStack | None = None
        self._aside: Callable[[], AbstractContextManager[None]] | None = None

    def _current(self) -> list[Block]:
        """The blocks that act: those after the last clean one, and it."""
        blocks = self.blocks
        last = [0, *(i for i, block in enumerate(blocks) if block.clean)][-1]
        return blocks[last:]

    @property
    def observers(self) -> list[Observer]:
        """Who listens now, outer blocks first."""
        return [one for block in self._current() for one in block.observers]

    @property
    def edits(self) -> list[CallEdit]:
        """What is edited now, in the order in which the blocks were entered."""
        return [one for block in self._current() for one in block.edits]

    @property
    def backend(self) -> str:
        """Which kernels run: what the handle of the innermost block says."""
        for block in reversed(self.blocks):
            if block.backend is not None:
                return block.backend()
        return "auto"

    def check_thread(self) -> None:
        """Raise `TapError` where another thread has a block open."""
        owner = self._owner
        if self.blocks and owner is not None and owner != threading.get_ident():
            raise TapError(
                "Another thread has a block open on this model, and attention can be observed or "
                "edited by one thread at a time: open the block in the thread that runs the model, "
                "let the threads take turns, or give each a copy (copy.deepcopy(model.module))."
            )

    @contextmanager
    def open(
        self,
        block: Block,
        install: Callable[[Tap], AbstractContextManager[None]],
        aside: Callable[[], AbstractContextManager[None]],
    ) -> Iterator[None]:
        """`block` is entered; the first that is active puts the tap in place, the last takes it
        away.

        Args:
            block: what is added.
            install: routes attention through this tap while its block lasts.
            aside: keeps what the installed adapter knows of the prompt at hand.

        Raises:
            TapError: another thread has a block open.
        """
        with self._lock:
            self.check_thread()
            self._owner = threading.get_ident()
            self.blocks.append(block)
        try:
            with self._lock:
                if block.active and self._installed is None:
                    stack = ExitStack()
                    stack.enter_context(install(self))
                    self._installed, self._aside = stack, aside
            yield
        finally:
            self._close(block)

    def _close(self, block: Block) -> None:
        with self._lock:
            self.blocks = [other for other in self.blocks if other is not block]
            stack = None
            if not any(other.active for other in self.blocks):
                stack, self._installed, self._aside = self._installed, None, None
            if not self.blocks:
                self._owner = None
            if stack is not None:
                stack.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs in this block leaves no trace in what the open blocks know of their prompt."""
        keep = self._aside
        with ExitStack() as stack:
            if keep is not None:
                stack.enter_context(keep())
            yield


#: attention module → (what a handle calls it, the tap of the handles that call it so)
_TAPS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Hashable, Tap]] = (
    weakref.WeakKeyDictionary()
)
_REGISTER = threading.Lock()


def shared_tap(modules: Sequence[tuple[torch.nn.Module, Hashable]]) -> Tap:
    """The tap of every handle on these modules that calls them the same; a new one for the first.

    It is kept as long as the modules live, and a copy of them has its own.

    Args:
        modules: the modules with attention, and what the handle calls each.
    """
    with _REGISTER:
        known = [_TAPS.get(module) for module, _ in modules]
        alike = [
            one for one, (_, name) in zip(known, modules, strict=True) if one and one[0] == name
        ]
        if modules and len(alike) == len(modules) and len({id(tap) for _, tap in alike}) == 1:
            return alike[0][1]
        tap = Tap()
        for (module, name), one in zip(modules, known, strict=True):
            if one is None:
                _TAPS[module] = (name, tap)
        return tap


@contextmanager
def undisturbed(module: Any) -> Iterator[None]:
    """Blocks that are open on any part of `module` don't see what runs in this block."""
    taps = {id(one[1]): one[1] for part in module.modules() if (one := _TAPS.get(part))}
    with ExitStack() as stack:
        for tap in taps.values():
            tap.check_thread()
            stack.enter_context(tap.aside())
        yield
