"""How long a text may be: a model's positions, and what lies beyond them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.errors import ContextError

if TYPE_CHECKING:
    from interp_hooks.protocol import Model


def check_context(model: Model, context: int, extrapolate: bool = False) -> None:
    """Refuses a context that exceeds the model's positions.

    Args:
        model: the model.
        context: in tokens.
        extrapolate: allow it, where positions do not end with a table (learned ones).

    Raises:
        ContextError: it exceeds them, and extrapolation was not asked for or cannot be.

    Example:
        >>> interp.inputs.check_context(model, 64)
        >>> interp.inputs.check_context(model, 10**6)
        Traceback (most recent call last):
        interp_hooks.errors.ContextError: ...
    """
    limit = model.max_context
    if limit is None or context <= limit:
        return
    if extrapolate and (table := model.position_table) is not None:
        raise ContextError(
            f"{model.name} has learned positions for {limit} tokens ({table}) and {context} are "
            "needed; it can't be "
            "extrapolated, use a shorter context."
        )
    if not extrapolate:
        raise ContextError(
            f"{model.name} has positions for {limit} tokens and {context} are needed; use a "
            "context of at most "
            f"{limit}, or allow extrapolation (--extrapolate) to go beyond what it was trained for."
        )


def extrapolation(model: Model, context: int) -> dict[str, Any] | None:
    """What goes into the record of a run past the model's positions: lengths, their ratio and the
    kind of RoPE."""
    limit = model.max_context
    if limit is None or context <= limit:
        return None
    config = getattr(model.module, "config", None)
    rope = getattr(getattr(config, "text_config", config), "rope_parameters", None)
    return dict(
        context=context,
        positions=limit,
        factor=round(context / limit, 4),
        rope=dict(rope) if rope else None,
    )
