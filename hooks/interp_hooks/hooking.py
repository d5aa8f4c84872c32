"""`hook(module)`: wrap a model and check the tap on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from interp_hooks.diffusion.adapter import DiffusersAdapter, is_diffusers
from interp_hooks.diffusion.samples import sample_of
from interp_hooks.errors import TapError
from interp_hooks.huggingface.adapter import HFAdapter
from interp_hooks.huggingface.discovery import attempt, one_line
from interp_hooks.huggingface.images import image_token, sample_inputs
from interp_hooks.huggingface.layout import DEFAULT, Layout
from interp_hooks.huggingface.picture_samples import picture_samples
from interp_hooks.huggingface.samples import samples_for
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

    A HuggingFace `PreTrainedModel`, a diffusers model (``pipe.transformer``), a
    `HookedTransformer` or a `TransformerBridge`; for names and folders use `interp.load`.

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
            f"interp can't tap a {type(module).__name__}; give a transformers, diffusers or "
            "TransformerLens model."
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
        adapter = TLAdapter(wrapped)
        sample = sample or sample_input(
            wrapped.cfg.d_vocab, next(wrapped.parameters()).device, padded=False
        )
        tokenizer = tokenizer if tokenizer is not None else getattr(wrapped, "tokenizer", None)
        name = name or getattr(wrapped.cfg, "model_name", None) or type(module).__name__
        model = HookedModel(adapter, str(name), tokenizer, backend, note)
        verify(model, sample)
        return model
    if is_diffusers(module):
        name = name or getattr(wrapped.config, "_name_or_path", "") or type(module).__name__
        given = _picture(wrapped) if sample is None else dict(sample)
        model = HookedModel(DiffusersAdapter(wrapped, given), str(name), None, backend, note)
        verify(model, given)
        return model
    if not (hasattr(module, "config") and hasattr(module, "set_attn_implementation")):
        raise TapError(
            f"interp can't tap a {type(module).__name__}; give a transformers or TransformerLens "
            "model."
        )
    name = name or getattr(wrapped.config, "name_or_path", "") or type(module).__name__
    if tokenizer is None and processor is not None:
        tokenizer = getattr(processor, "tokenizer", None)
    sample = _sample(wrapped, sample, processor)

    def tapped(own: bool, plain: bool = True) -> HookedModel:
        adapter = HFAdapter(wrapped, sample, layout or DEFAULT, own, plain)
        model = HookedModel(adapter, str(name), tokenizer, backend, note, processor)
        attempt(wrapped, lambda: verify(model, sample))
        return model

    try:
        return tapped(own=False)
    except TapError as reason:
        by_interface = reason
    # it may compute attention itself, or do with masks what the interface does not allow for
    try:
        return tapped(own=True)
    except TapError as reason:
        by_itself = reason
    try:
        return tapped(own=True, plain=False)
    except TapError:
        raise TapError(f"{by_interface} {by_itself}") from by_interface


@torch.no_grad()
def _picture(module: Any) -> dict[str, Any]:
    """The arguments of one step of a diffusers model. Raises `TapError` where none can be made."""
    try:
        made = sample_of(module)
        module(**made)
        return made
    except Exception as error:  # an architecture's code may raise anything
        raise TapError(
            f"{type(module).__name__} does not run on one small picture made from its config; give "
            f"the arguments of a forward (sample=) ({one_line(error)})."
        ) from error


@torch.no_grad()
def _sample(
    module: Any, sample: dict[str, torch.Tensor] | None, processor: Any
) -> dict[str, torch.Tensor]:
    """The input of the check on load, on which the untouched model runs. Raises `TapError` where
    none can be made."""
    name, sees = type(module).__name__, image_token(module.config) is not None
    if sample is not None:
        given: Iterable[dict[str, torch.Tensor]] = [dict(sample)]
        advice = "the input that was given (sample=)"
    elif sees and processor is not None:
        inputs = sample_inputs(module.config, processor)
        given = [{k: v.to(device_of(module)) for k, v in inputs.items()}]
        advice = "the prompt with a picture that its processor makes; give an input (sample=)"
    elif sees:
        given = picture_samples(module)
        advice = (
            "a prompt with a picture made from its config: give its processor (processor=), or a "
            "short input with an image (sample=), so that its vision tower is found"
        )
    else:
        given = samples_for(module)
        advice = "a short input made from its config; give one of your own (sample=)"
    why = ""
    try:
        for one in given:
            try:
                module(**one)
                return one
            except Exception as error:  # an architecture's code may raise anything
                why = why or f" ({one_line(error)})"
    except Exception as error:  # configs hold anything
        why = f" ({one_line(error)})"
    raise TapError(f"{name} does not run on {advice}{why}.")
