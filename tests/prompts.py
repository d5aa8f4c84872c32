"""Token rows for tiny models, padded in every way, and a HookedTransformer of a HuggingFace one."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch

from interp_hooks import HookedModel

LENGTH = 14


PADS = (0, 5)


def tokens(seed: int = 1, batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 101, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str) -> torch.Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side:
        mask[1, slice(PADS[1]) if side == "left" else slice(-PADS[1], None)] = 0
    return mask


def left_padded(padding: bool, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    if padding:
        mask[1, : PADS[1]] = 0
    return mask


def inputs_for(
    model: HookedModel, ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    given = dict(input_ids=ids, attention_mask=mask)
    if "position_ids" in model.accepts:
        given["position_ids"] = tiny.positions(mask)
    return given


def hooked_transformer(model: Any) -> Any:
    """An explicit config and converted weights: `HookedTransformer.from_pretrained` takes official
    names only."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import (
        convert_gpt2_weights,
        convert_llama_weights,
    )

    c = model.config
    common = dict(
        n_layers=2, d_model=32, n_heads=4, d_head=8, n_ctx=128, d_vocab=c.vocab_size, device="cpu"
    )
    if c.model_type == "llama":
        config = HookedTransformerConfig(
            **common,
            d_mlp=48,
            act_fn="silu",
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=8,
            n_key_value_heads=2,
            eps=c.rms_norm_eps,
        )
        state = convert_llama_weights(copy.deepcopy(model), config)
    else:
        config = HookedTransformerConfig(
            **common,
            d_mlp=128,
            act_fn="gelu_new",
            normalization_type="LN",
            positional_embedding_type="standard",
            eps=1e-5,
        )
        state = convert_gpt2_weights(copy.deepcopy(model), config)
    made = HookedTransformer(config)
    kept = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    made.load_and_process_state_dict(state, **kept)
    return made.eval()
