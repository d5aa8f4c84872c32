"""Settings of a method that go into the record of where its results come from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

from interp_hooks.heads import Head


class SettingsRecord:
    """Something whose dataclass fields are its settings."""

    @classmethod
    def settings(cls) -> list[str]:
        """Names of the settings."""
        return [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]

    def record(self) -> dict[str, Any]:
        """The settings for the record of where a result comes from; functions by name and code."""
        return {name: _plain(getattr(self, name)) for name in self.settings()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Head):
        return str(value)
    code = getattr(value, "__code__", None)
    if code is not None:  # another function of the same name is another setting
        written = (
            code.co_code,
            code.co_names,
            [c for c in code.co_consts if not hasattr(c, "co_code")],
        )
        return f"{value.__qualname__}:{hashlib.sha256(repr(written).encode()).hexdigest()[:16]}"
    return getattr(value, "__qualname__", repr(value))
