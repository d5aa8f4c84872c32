"""Which module runs now, by the path it is called on, and for which time in this forward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch


class ModuleStack:
    """The modules of a model whose forwards are running, outermost first, while the block lasts.

    A module that stands in several places (blocks that share their attention) has several paths;
    `path` gives the one on which it is called.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self.running: tuple[torch.nn.Module, ...] = ()
        self._turns: dict[int, int] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> ModuleStack:
        for module in self._model.modules():
            enter = module.register_forward_pre_hook(self._enter)
            leave = module.register_forward_hook(self._leave, always_call=True)
            self._hooks.callback(enter.remove)
            self._hooks.callback(leave.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        self.restart()

    def restart(self) -> None:
        """Forget the forwards so far."""
        self._turns.clear()
        self.running = ()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self.running = (*self.running, module)
        self._turns[id(module)] = self._turns.get(id(module), -1) + 1

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.running = self.running[:-1]

    def turn(self, module: torch.nn.Module) -> int:
        """How many forwards of the module went before the one that runs."""
        return self._turns.get(id(module), 0)

    def path(self, module: torch.nn.Module) -> str:
        """The path on which a running module is called."""
        found = ""
        for one in self.running:
            paths = self._paths.get(id(one), [found])
            found = next((p for p in paths if p.startswith(found + ".") or not found), paths[0])
            if one is module:
                return found
        return self._paths.get(id(module), [""])[0]


class Turns:
    """Tells a module that a forward runs several times (blocks with shared weights) which time it
    is: `turn(module)` from 0, counted anew in each forward of the model."""

    def __init__(self, model: torch.nn.Module, times: Mapping[int, int]):
        self._model, self._times = model, times
        self._begun: dict[int, int] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Turns:
        shared = [m for m in self._model.modules() if self._times.get(id(m), 1) > 1]
        if shared:
            hook = self._model.register_forward_pre_hook(lambda *_: self._begun.clear())
            self._hooks.callback(hook.remove)
        for module in shared:
            hook = module.register_forward_pre_hook(partial(self._begin, id(module)))
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def _begin(self, key: int, *call: Any) -> None:
        self._begun[key] = self._begun.get(key, -1) + 1

    def turn(self, module: torch.nn.Module) -> int:
        """Which of the module's calls in a forward this is; towers that run by themselves (an
        encoder under `generate`) begin anew after their last."""
        return self._begun.get(id(module), 0) % self._times.get(id(module), 1)
