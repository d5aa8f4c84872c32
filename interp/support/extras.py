"""Packages that only a part of the toolkit needs: the extras of its distribution."""

from __future__ import annotations

from importlib.util import find_spec

from interp.errors import MissingExtraError


def need(module: str, *, extra: str, what: str) -> None:
    """Raise `MissingExtraError` unless `module` can be imported. Nothing is imported.

    To be called before work begins, the import itself stands where the module is used.

    Args:
        module: the package as it is imported, "sae_lens".
        extra: the extra that installs it, "sae".
        what: what it is needed for, in the plural, "Discrete-SAE circuits".

    Raises:
        MissingExtraError: it is not installed; the sentence has the command that installs it.
    """
    if find_spec(module) is None:
        raise MissingExtraError(
            f"{what} need {module.replace('_', '-')}; install it with: pip install "
            f"'interp[{extra}]'."
        )
