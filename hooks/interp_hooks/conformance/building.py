"""A tiny model of an architecture with peaky random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from interp_hooks.conformance.configs import tiny

#: kind → transformers' table of the classes that do its task, in order of preference
KINDS: dict[str, tuple[str, ...]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "speech": (
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    ),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
    "vlm": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",),
}
#: tokens of a prompt, and how many of the second row are padding where there is any
TOKENS, PADS = 12, 3
#: standard deviation of the weights: attention is then far from uniform
PEAKY = 0.2


@dataclass(frozen=True)
class Built:
    """A model and its inputs.

    Attributes:
        module: in eval mode.
        inputs: without padding.
        padded: with padding; None where the model takes none.
        processor: of models that read pictures.
    """

    module: Any
    inputs: dict[str, Any]
    padded: dict[str, Any] | None = None
    processor: Any = None


def classes(kind: str) -> dict[str, str]:
    """Model type → class name, of every architecture of a kind in the installed transformers."""
    from transformers.models.auto import modeling_auto

    by_type: dict[str, str] = {}
    for table in KINDS[kind]:
        for model_type, name in getattr(modeling_auto, table).items():
            by_type.setdefault(model_type, name if isinstance(name, str) else name[0])
    return by_type


def build(kind: str, model_type: str, seed: int = 0) -> Built:
    """A tiny random model of an architecture with inputs.

    Raises:
        whatever transformers raises for it.
    """
    import transformers

    torch.manual_seed(seed)
    if kind == "vlm":
        return _with_pictures(model_type, classes(kind)[model_type], seed)
    model_class = getattr(transformers, classes(kind)[model_type])
    config = tiny(model_class.config_class)
    config._attn_implementation = "eager"
    module = model_class(config).eval()
    generation = getattr(module, "generation_config", None)
    if kind == "seq2seq" and generation is not None and generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = 1
    peaky(module)
    inputs, padded = _inputs(kind, module)
    if not _finite(
        module, inputs
    ):  # recurrences can blow up: the weights as transformers made them
        torch.manual_seed(seed)
        module = model_class(config).eval()
    return Built(module, inputs, padded)


def _with_pictures(model_type: str, class_name: str, seed: int) -> Built:
    """A vision-language model: from its family's builder with its real processor, or any small
    config with the first prompt and picture that are made from a config and that it runs on."""
    import transformers

    from interp_hooks.conformance import vlm
    from interp_hooks.huggingface.picture_samples import picture_samples

    try:
        made = vlm.build(model_type)
        return Built(made.module, made.inputs, made.padded, made.processor)
    except Exception:
        if model_type in vlm.FAMILIES:
            raise
    torch.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    config = tiny(model_class.config_class)
    config._attn_implementation = "eager"
    module = model_class(config).eval()
    peaky(module)
    return Built(module, _sampled(module, picture_samples(module)))


@torch.no_grad()
def _finite(module: Any, inputs: dict[str, Any]) -> bool:
    out = module(**inputs)
    return all(
        bool(torch.isfinite(value).all())
        for value in (out.values() if hasattr(out, "values") else out)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    )


@torch.no_grad()
def peaky(module: torch.nn.Module) -> None:
    """Makes weights large enough that no pattern is uniform, and no bias or gain trivial."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, (torch.nn.Linear, Conv1D, torch.nn.Embedding)):
                parameter.copy_(noise(parameter) * (PEAKY if parameter.ndim > 1 else PEAKY / 2))
            elif parameter.ndim >= 3 and "conv" not in name and float(parameter.std()) < PEAKY:
                parameter.copy_(noise(parameter) * PEAKY)  # experts
            elif "norm" in type(part).__name__.lower() or "sink" in name:
                parameter.add_(noise(parameter) * PEAKY)
        if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx] = 0


def _inputs(kind: str, module: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Inputs without and with padding."""
    if kind in ("speech", "image"):
        return _sampled(module), None
    rows = 2
    if module.config.model_type.startswith("musicgen"):
        rows *= module.config.num_codebooks  # a row a codebook
    ids = torch.randint(9, 88, (rows, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids[:2])
    if kind == "seq2seq":
        decoder = ids[:, :8].flip(1).contiguous()
        inputs = dict(input_ids=ids, decoder_input_ids=decoder)
        mask[1, -PADS:] = 0  # encoders are padded on the right
        return inputs, dict(inputs, attention_mask=mask)
    mask[1, :PADS] = 0
    return dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def _sampled(module: Any, samples: Iterable[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The first input made from the config on which the model runs, as the check on load does it.

    Raises:
        whatever the model raised on the first one.
    """
    from interp_hooks.huggingface.samples import samples_for

    first: Exception | None = None
    for inputs in samples_for(module) if samples is None else samples:
        try:
            module(**inputs)
            return inputs
        except Exception as error:  # an architecture's code may raise anything
            first = first or error
    raise first or ValueError(f"no input can be made for {type(module).__name__}")
