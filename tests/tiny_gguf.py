"""Tiny GGUF files, written by llama.cpp's conventions, and the random models they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as hf
from gguf import GGMLQuantizationType as Kind

LAYERS, WIDTH, HEADS, HEAD = 2, 64, 4, 16
CONTEXT = 128
WORDS = ("the", "cat", "saw", "a", "dog", "and", "code", "of", "Rome", "is")
SHARED = dict(
    hidden_size=WIDTH,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,  # sharp patterns, or a slip in q and k would not be seen
)
#: not the default: one that is not read is seen
ROTARY = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))


def alphabet() -> list[str]:
    """GPT-2's 256 characters for the 256 bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def byte_level() -> tuple[dict[str, Any], int]:
    """A byte-level BPE of bytes, the merges that make the words, and one end token."""
    tokens, merges = alphabet(), list[str]()
    for word in WORDS:
        spelled = "Ġ"
        for letter in word:
            if f"{spelled} {letter}" not in merges:
                merges.append(f"{spelled} {letter}")
                tokens.append(spelled + letter)
            spelled += letter
    tokens.append("<|end|>")
    end = len(tokens) - 1
    return dict(
        model="gpt2",
        tokens=tokens,
        types=[1] * end + [3],
        merges=merges,
        special=dict(bos=end, eos=end, unk=end),
    ), len(tokens)


def sentencepiece(add_bos: bool) -> tuple[dict[str, Any], int]:
    """A sentencepiece-like vocabulary of specials, bytes, letters and words."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
    grown = [f"▁{word[:n]}" for word in WORDS for n in range(1, len(word) + 1)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    start = len(tokens)
    tokens += list(dict.fromkeys([*letters, *sorted(set(grown), key=len)]))
    return dict(
        model="llama",
        tokens=tokens,
        types=[3, 3, 3, 2, *[6] * 256, *[1] * (len(tokens) - start)],
        scores=[-float(i) for i in range(len(tokens))],
        special=dict(pad=0, eos=1, bos=2, unk=3),
        add_bos=add_bos,
    ), len(tokens)


def llama(size: int) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=size, head_dim=HEAD, **SHARED, **ROTARY))


def qwen2(size: int) -> hf.PreTrainedModel:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=size, **SHARED, **ROTARY))


def gemma2(size: int) -> hf.PreTrainedModel:
    config = hf.Gemma2Config(vocab_size=size, head_dim=HEAD, sliding_window=32, **SHARED, **ROTARY)
    return hf.Gemma2ForCausalLM(config)


def gemma3(size: int) -> hf.PreTrainedModel:
    config = hf.Gemma3TextConfig(vocab_size=size, head_dim=HEAD, sliding_window=32, **SHARED)
    return hf.Gemma3ForCausalLM(config)


def gpt2(size: int) -> hf.PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=size,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=0.2,
    )
    return hf.GPT2LMHeadModel(config)


#: architecture → its random model, its tokenizer's data
BUILD: dict[str, tuple[Callable[[int], Any], Callable[[], tuple[dict[str, Any], int]]]] = {
    "llama": (llama, byte_level),
    "qwen2": (qwen2, byte_level),
    "gpt2": (gpt2, byte_level),
    "gemma2": (gemma2, lambda: sentencepiece(True)),
    "gemma3": (gemma3, lambda: sentencepiece(True)),
}


def model(architecture: str) -> Any:
    """The random model that `write` writes: norms and biases are random too, or a slip in them
    would not be seen."""
    build, vocabulary = BUILD[architecture]
    torch.manual_seed(0)
    module = build(vocabulary()[1]).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    return module


def write(
    path: Path,
    architecture: str,
    module: Any,
    kind: Kind = Kind.F32,
    split: str = "",
    template: str = "",
) -> Path:
    """Write `module` as a GGUF file; matrices in blocks of `kind`, the rest in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    config = module.config
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * WIDTH)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        if architecture.startswith("gemma"):
            writer.add_sliding_window(config.sliding_window)
        theta = getattr(config, "rope_parameters", None) or {}
        theta = theta.get("full_attention", theta).get("rope_theta")
        if theta:
            writer.add_rope_freq_base(theta)
    _tokenizer(writer, BUILD[architecture][1]()[0], split, template)
    for name, tensor in tensors(architecture, module):
        values = tensor.detach().numpy().astype(np.float32)
        if values.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer(writer: Any, data: dict[str, Any], split: str, template: str) -> None:
    writer.add_tokenizer_model(data["model"])
    writer.add_token_list(data["tokens"])
    writer.add_token_types(data["types"])
    if split:
        writer.add_tokenizer_pre(split)
    if "merges" in data:
        writer.add_token_merges(data["merges"])
    if "scores" in data:
        writer.add_token_scores(data["scores"])
    if "add_bos" in data:
        writer.add_add_bos_token(data["add_bos"])
    for name, token in data["special"].items():
        getattr(writer, f"add_{name}_token_id")(token)
    if template:
        writer.add_chat_template(template)


def tensors(architecture: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's name → tensor, as its converter writes them: GPT-2's matrices the other way
    round, Gemma's norms with their one added, Llama's queries and keys with rotary pairs side by
    side."""
    if architecture == "gpt2":
        yield from _gpt2(module.transformer)
        return
    body, add = module.model, 1.0 if architecture.startswith("gemma") else 0.0
    yield "token_embd.weight", body.embed_tokens.weight
    yield "output_norm.weight", body.norm.weight + add
    if not module.config.tie_word_embeddings:
        yield "output.weight", module.lm_head.weight
    for n, layer in enumerate(body.layers):
        at, mlp = layer.self_attn, layer.mlp
        for letter in "qkvo":
            linear, name = getattr(at, f"{letter}_proj"), "output" if letter == "o" else letter
            weight = linear.weight
            if architecture == "llama" and letter in "qk":
                weight = paired(weight)
            yield f"blk.{n}.attn_{name}.weight", weight
            if linear.bias is not None:
                yield f"blk.{n}.attn_{name}.bias", linear.bias
        for name in ("gate", "up", "down"):
            yield f"blk.{n}.ffn_{name}.weight", getattr(mlp, f"{name}_proj").weight
        yield f"blk.{n}.attn_norm.weight", layer.input_layernorm.weight + add
        after = layer.post_attention_layernorm.weight + add
        if add:
            yield f"blk.{n}.post_attention_norm.weight", after
            yield f"blk.{n}.ffn_norm.weight", layer.pre_feedforward_layernorm.weight + add
            yield f"blk.{n}.post_ffw_norm.weight", layer.post_feedforward_layernorm.weight + add
        else:
            yield f"blk.{n}.ffn_norm.weight", after
        if architecture == "gemma3":
            yield f"blk.{n}.attn_q_norm.weight", at.q_norm.weight + add
            yield f"blk.{n}.attn_k_norm.weight", at.k_norm.weight + add


def paired(weight: torch.Tensor) -> torch.Tensor:
    """Rows of each head with the two of a rotary pair side by side: (h, 2, d/2) → (h, d/2, 2)."""
    halves = weight.reshape(-1, 2, HEAD // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _gpt2(body: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield "token_embd.weight", body.wte.weight
    yield "position_embd.weight", body.wpe.weight
    yield "output_norm.weight", body.ln_f.weight
    yield "output_norm.bias", body.ln_f.bias
    for n, layer in enumerate(body.h):
        matrices = dict(
            attn_qkv=layer.attn.c_attn,
            attn_output=layer.attn.c_proj,
            ffn_up=layer.mlp.c_fc,
            ffn_down=layer.mlp.c_proj,
        )
        for name, matrix in matrices.items():
            yield f"blk.{n}.{name}.weight", matrix.weight.T.contiguous()
            yield f"blk.{n}.{name}.bias", matrix.bias
        for name, norm in dict(attn_norm=layer.ln_1, ffn_norm=layer.ln_2).items():
            yield f"blk.{n}.{name}.weight", norm.weight
            yield f"blk.{n}.{name}.bias", norm.bias
