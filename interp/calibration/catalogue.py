"""Calibration methods by name. A new method is one file here and one line in this list."""

from __future__ import annotations

from typing import Any

from interp.calibration.calibration_method import Method
from interp.errors import InputError
from interp.support.presets import settings_of
from interp.support.registry import Registry

registry: Registry[type[Method]] = Registry(
    "calibration method",
    "interp.calibration",
    {
        "act": "interp.calibration.act_head_filter:HeadFilter",
        "zerotuning": "interp.calibration.zerotuning:HeadProfile",
        "headhunter": "interp.calibration.headhunter:HeadHunter",
        "gates": "interp.calibration.gates:GateTraining",
    },
    make=lambda cls: cls,  # type: ignore[arg-type, return-value]
)


def names() -> list[str]:
    """Names of all calibration methods.

    Example:
        >>> "zerotuning" in interp.calibration.names()
        True
    """
    return registry.names()


def make(method: str | Method, settings: dict[str, Any], preset: str | None = None) -> Method:
    """A method with a preset's settings and these on top. Raises `UnknownNameError`,
    `InputError`."""
    if isinstance(method, Method):
        more = [*settings, *(["preset"] if preset is not None else [])]
        if more:
            raise InputError(
                f"The method {method.name} has its settings already; {more[0]} is one more."
            )
        return method
    kind = registry.get(method)
    unknown = [name for name in settings if name not in kind.settings()]
    if unknown:
        listing = ", ".join(kind.settings())
        raise InputError(
            f"The calibration method {method} has no setting {unknown[0]!r}; it has {listing}."
        )
    return kind(**{**settings_of(f"calibration method {method}", preset, kind.presets), **settings})
