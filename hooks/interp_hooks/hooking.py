"""`hook(module)`: wrap a model and check the tap on it."""

from __future__ import annotations

from typing import Any

import torch

from interp_hooks.errors import TapError
from interp_hooks.huggingface.adapter import HFAdapter
from interp_hooks.huggingface.images import image_token, sample_inputs
from interp_hooks.huggingface.layout import DEFAULT, Layout
from interp_hooks.model import HookedModel
from interp_hooks.transformer_lens.adapter import TLAdapter, is_transformer_lens
from interp_hooks.verify import verify
from interp_hooks.wrapping import device_of, eagerly, evaluating, uncompiled


def sample_input(
    vocabulary: int, device: torch.device, padded: bool = True
) -> dict[str, torch.Tensor]:
    """Two short rows of token ids, the second left-padded by two."""
    ids = (torch.arange(14, device=device).reshape(2, 7) * 37 + 11) % vocabulary
    if not padded:
        return dict(input_ids=ids)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return dict(input_ids=ids, attention_mask=mask)


def hook(
    module: Any,
    name: str | None = None,
    tokenizer: Any = None,
    backend: str = "auto",
    note: str | None = None,
    sample: dict[str, torch.Tensor] | None = None,
    processor: Any = None,
    layout: Layout | None = None,
) -> HookedModel:
    """Wraps a loaded model so that its attention can be observed and edited, and checks the tap.

    A HuggingFace `PreTrainedModel`, a `HookedTransformer` or a `TransformerBridge`; for names and
    folders use `interp.load`.

    Args:
        module: the model.
        name: what messages and records call it; None for what the model says itself.
        tokenizer: for the tasks and probes that need one.
        backend: "auto", "reference", "streaming" or "triton".
        note: a sentence that belongs beside the model's name.
        sample: a short input for the load-time check (default: a few token ids, one row
            left-padded; with a `processor`, a prompt with an image). A vision-language model needs
            one of the two, to find its vision tower.
        processor: of a vision-language model.
        layout: the module names of an architecture that the table of
            `interp_hooks.huggingface.layout` does not know.

    Returns:
        The `HookedModel`; one that is wrapped already is given back as it is.

    Raises:
        TapError: a layer can't be tapped or the tap would change the model.

    Example:
        >>> from interp_hooks import hook
        >>> hook(model.module, name="mine", tokenizer=model.tokenizer)
        HookedModel(mine: 4 layers × 8 heads, 4 kv heads)
    """
    if isinstance(module, HookedModel):
        return module
    module = uncompiled(module)
    if not isinstance(module, torch.nn.Module):
        raise TapError(
            f"interp can't tap a {type(module).__name__}; give a transformers or TransformerLens "
            "model."
        )
    with evaluating(module), eagerly():  # left in training mode, if it is
        return _checked(module, name, tokenizer, backend, note, sample, processor, layout)


def _checked(
    module: Any,
    name: str | None,
    tokenizer: Any,
    backend: str,
    note: str | None,
    sample: dict[str, torch.Tensor] | None,
    processor: Any,
    layout: Layout | None,
) -> HookedModel:
    """`hook` of a model in evaluation mode."""
    wrapped: Any = module
    if is_transformer_lens(module):
        adapter: Any = TLAdapter(wrapped)
        sample = sample or sample_input(
            wrapped.cfg.d_vocab, next(wrapped.parameters()).device, padded=False
        )
        tokenizer = tokenizer if tokenizer is not None else getattr(wrapped, "tokenizer", None)
        name = name or getattr(wrapped.cfg, "model_name", None) or type(module).__name__
    elif hasattr(module, "config") and hasattr(module, "set_attn_implementation"):
        vocabulary = getattr(wrapped.config.get_text_config(), "vocab_size", None) or 100
        if sample is None and image_token(wrapped.config) is not None:
            if processor is None:
                raise TapError(
                    f"{type(module).__name__} takes images: give its processor (processor=), or a "
                    "short input with an "
                    "image (sample=), so that its vision tower is found."
                )
            sample = {
                k: v.to(device_of(wrapped))
                for k, v in sample_inputs(wrapped.config, processor).items()
            }
        sample = sample or sample_input(vocabulary, device_of(wrapped))
        adapter = HFAdapter(wrapped, sample, layout or DEFAULT)
        name = name or getattr(wrapped.config, "name_or_path", "") or type(module).__name__
    else:
        raise TapError(
            f"interp can't tap a {type(module).__name__}; give a transformers or TransformerLens "
            "model."
        )
    if tokenizer is None and processor is not None:
        tokenizer = processor.tokenizer
    model = HookedModel(adapter, str(name), tokenizer, backend, note, processor)
    verify(model, sample)
    return model
