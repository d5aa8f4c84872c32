"""Settings under a name: how `preset=` is read wherever something has presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.errors import InputError, InterpError


def settings_of(
    owner: str,
    name: Any,
    presets: Mapping[str, Mapping[str, Any]],
    error: type[InterpError] = InputError,
) -> dict[str, Any]:
    """The settings of the preset called `name`; none for None.

    Args:
        owner: whose presets they are, for the sentence: "edit act".
        name: as it was given.
        presets: name → settings.
        error: what is raised.

    Raises:
        InputError, or `error`: a name that is not among the presets.

    Example:
        >>> from interp.support.presets import settings_of
        >>> settings_of("edit act", "code", {"paper": {}, "code": {"threshold": 0.1}})
        {'threshold': 0.1}
    """
    if name is None:
        return {}
    if not isinstance(name, str) or name not in presets:
        there = ", ".join(presets) or "none"
        raise error(f"The {owner} has no preset {name!r}; it has {there}.")
    return dict(presets[name])
