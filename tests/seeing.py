"""A small LLaVA with random weights, its untouched eager twin, prompts with scenes, texts written
token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import tiny
import torch
import train_pocket_llava as pocket
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from interp import scenes
from interp.vision.prompts import with_images
from interp_hooks import HookedModel, hook

Inputs = dict[str, torch.Tensor]
TEXTS = ("is there a table ?", pocket.DESCRIBE)


@functools.cache
def llava() -> tuple[HookedModel, Any]:
    """(tapped, eager twin), with weights large enough that heads, images and positions make a
    difference."""
    processor = pocket.build_processor()
    module = pocket.build_model(processor.tokenizer, 0).eval()
    tiny.stir(module)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 2 and ("q_proj" in name or "k_proj" in name):
                weight.mul_(3)
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 3
    return hook(module, name="tiny-llava", processor=processor), tiny.eager(module)


def pictures(n: int = 2, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [scenes.render(scenes.usual(rng)) for _ in range(n)]


def prompts(texts: Sequence[str] = TEXTS) -> Inputs:
    """A batch of prompts of different length, left-padded, an image each."""
    return with_images(llava()[0], list(texts), pictures(len(texts)))


def alone(inputs: Mapping[str, torch.Tensor], row: int) -> Inputs:
    """One prompt of a batch, without padding."""
    real = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row : row + 1, real]
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=inputs["pixel_values"][row : row + 1],
    )


@torch.no_grad()
def stepwise(
    model: Any, inputs: Inputs, new: Sequence[int], start: int | None = None
) -> torch.Tensor:
    """(new tokens, vocabulary): logits before each new token, the prompt read first, then a token
    at a time. `start`: of the prompt, so many tokens at once."""
    ids, cache, found = inputs["input_ids"], None, []
    step = start or ids.shape[1]
    singles = [*ids[0, step:].tolist(), *new[:-1]]
    parts = [ids[:, :step], *(torch.tensor([[t]]) for t in singles)]
    for i, part in enumerate(parts):
        more = dict(pixel_values=inputs["pixel_values"]) if i == 0 else {}
        out = model(input_ids=part, past_key_values=cache, use_cache=True, **more)
        cache = out.past_key_values
        found.append(out.logits[0, -1])
    return torch.stack(found[-len(new) :])


HOW: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=0, num_return_sequences=2),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}
NEW = 5


@torch.no_grad()
def generated(
    inputs: Inputs, how: str, block: AbstractContextManager[Any] | None = None, **more: Any
) -> list[tuple[int, list[int], torch.Tensor, torch.Tensor | None]]:
    """For each text written: (row of its prompt, new tokens, logits and scores (new, vocabulary));
    beams: no scores."""
    model, width = llava()[0], inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    with block or nullcontext():
        out = model.generate(
            **inputs,
            max_new_tokens=NEW,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **HOW[how],
            **more,
        )
    each = len(out.sequences) // len(inputs["input_ids"])
    found = []
    for text, sequence in enumerate(out.sequences):
        beams = out.beam_indices[text].tolist() if how == "beams" else [text] * NEW
        logits = torch.stack([out.logits[i][beam] for i, beam in enumerate(beams)])
        scores = None if how == "beams" else torch.stack([out.scores[i][text] for i in range(NEW)])
        found.append((text // each, sequence[width:].tolist(), logits, scores))
    return found


@contextmanager
def attending(twin: Any, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The text tower's attention replaced by `function(layer, q, k, v, sees, scaling)`, float64: k
    and v with the heads of q, sees (batch, 1, queries, keys) bool."""

    def attend(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any
    ) -> tuple[Any, None]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        if not hasattr(module, "layer_idx"):
            a = torch.softmax(scaling * (q.double() @ k.transpose(-1, -2)), -1)
            return (a @ v).transpose(1, 2).to(q.dtype), None
        n, m = q.shape[2], k.shape[2]
        causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]
        sees = causal if mask is None else mask[..., :m] > -1
        return function(module.layer_idx, q.double(), k, v, sees, scaling).transpose(1, 2).to(
            q.dtype
        ), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", eager_mask)
    twin.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        twin.set_attn_implementation("eager")


def weights(q: torch.Tensor, k: torch.Tensor, sees: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.softmax((scaling * (q @ k.transpose(-1, -2))).masked_fill(~sees, -torch.inf), -1)
