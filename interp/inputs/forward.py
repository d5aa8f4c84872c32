"""Forwards that treat every model alike: padding, positions, and the logits that are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from interp_hooks.protocol import Model


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids under left padding: the first real token stands at 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def forward(
    model: Model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    keep: int | None = None,
    **more: Any,
) -> Any:
    """One forward: pads are masked, positions start at the first real token.

    Args:
        model: the model.
        input_ids, attention_mask: (batch, tokens).
        keep: logits of the last so many rows only.
        more: what the model's forward takes besides.

    Returns:
        What the model returns.

    Example:
        >>> interp.inputs.forward(model, torch.arange(8)[None], keep=1).logits.shape[:2]
        torch.Size([1, 1])
    """
    inputs: dict[str, Any] = dict(input_ids=input_ids, **more)
    accepts = model.accepts
    inputs.pop("labels", None)  # of a loss, which some processors add and nothing here reads
    if attention_mask is not None and not bool(attention_mask.all()):
        inputs["attention_mask"] = attention_mask
        if "position_ids" in accepts and "position_ids" not in more:
            inputs["position_ids"] = positions(attention_mask)[:, -input_ids.shape[1] :]
    if keep is not None and "logits_to_keep" in accepts:
        inputs["logits_to_keep"] = keep
    if "use_cache" in accepts and "use_cache" not in more:
        inputs["use_cache"] = False
    return model(**inputs)
