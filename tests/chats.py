"""Tiny models to chat with: a template for the pocket tokenizer, a model that says one thing."""

from __future__ import annotations

import copy
from typing import Any

import tiny
import torch
import transformers as hf

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = "<|end|>"


def talking(tokenizer: Any) -> Any:
    """A copy of a tokenizer with a chat template and a token that ends turns."""
    reader = copy.deepcopy(tokenizer)
    reader.add_special_tokens({"additional_special_tokens": [END]})
    reader.chat_template = TEMPLATE
    return reader


def always(token: int, size: int) -> Any:
    """A random Llama whose next token is `token`, whatever it reads: one dimension of its stream is
    large in all tokens, and only this token's logit reads it."""
    module: Any = tiny.build("llama", size)
    with torch.no_grad():
        module.get_input_embeddings().weight[:, 0] = 20.0
        module.lm_head.weight[:, 0] = 0.0
        module.lm_head.weight[token, 0] = 5.0
    module.generation_config = hf.GenerationConfig(eos_token_id=2, pad_token_id=0)
    return module
