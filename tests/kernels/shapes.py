"""What operations do, counted from shapes alone: how many run, what memory they hold at a time,
and which make the host wait for a device."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts operations and the bytes that they hold; works on meta tensors.

    Attributes:
        ops: name → how often it ran, views left out.
        peak: most bytes held at a time by tensors that were made under it.
        widest: elements of the largest tensor made under it.
    """

    VIEWS = frozenset(
        "view reshape _unsafe_view slice select transpose unsqueeze squeeze expand permute t alias "
        "as_strided unbind split diagonal detach narrow _reshape_alias".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.peak = self.live = self.widest = 0
        self._holders: Counter[int] = Counter()
        self._outside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                key = leaf.untyped_storage()._cdata
                if key not in self._holders:
                    self._outside.add(key)
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in self.VIEWS:
            self.ops[name] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._hold(leaf)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.widest = max(self.widest, tensor.numel())
        if key in self._outside:
            return
        if not self._holders[key]:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live -= size
