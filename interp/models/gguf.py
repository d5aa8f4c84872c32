"""GGUF files, as llama.cpp uses them: read by transformers, dequantised to plain weights.

A GGUF holds its weights in blocks of few bits with a scale each, and no config.json: what the
model is stands in its metadata, under llama.cpp's names. transformers rebuilds both, for the
architectures that it knows. What it would get wrong in silence is looked for here.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from interp.errors import MissingExtraError, ModelError

#: llama.cpp's name of a pre-tokenizer (tokenizer.ggml.pre) → those that split digits singly, and
#: then as GPT-2 does; transformers gives them GPT-2's alone
SINGLE_DIGITS = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
#: those that are GPT-2's, which is what transformers takes for all that it does not know
AS_GPT2 = {
    *("default", "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "dolly", "jais", "gigachat"),
    *("jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "mellum", "modern-bert"),
}
#: kinds of tokenizer that have no such pre-tokenizer: sentencepiece and its like
WITHOUT_SPLIT = {"llama", "t5", "gemma4"}
#: llama.cpp's names of architectures whose name in transformers is another
SPELLED = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "t5encoder": "t5",
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Attributes:
        architecture: llama.cpp's name of it.
        quantisation: how most of its weights are stored, "Q4_1".
        is_quantised: whether any weights are stored in blocks.
        tokenizer: kind of tokenizer, "gpt2" (byte-level), "llama" (sentencepiece); None without.
        split: name of its pre-tokenizer, None where there is none.
        unread: what changes the model's numbers and transformers does not read.
    """

    architecture: str
    quantisation: str
    is_quantised: bool
    tokenizer: str | None
    split: str | None
    unread: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A model out of a GGUF file: its module, its tokenizer or None, how its weights were stored,
    and sentences that belong beside it."""

    module: Any
    tokenizer: Any
    weights: str
    notes: tuple[str, ...]


def header(path: Path) -> Header:
    """What a GGUF file says about itself, the weights unread.

    Raises:
        ModelError: no GGUF file, or one that is cut off.
        MissingExtraError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("GGUF files need gguf; install it with: pip install gguf.")
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = reader.fields

        def text(key: str) -> str | None:
            return str(fields[key].contents()) if key in fields else None

        stored: Counter[str] = Counter()
        for tensor in reader.tensors:
            stored[tensor.tensor_type.name] += int(tensor.n_elements)
        architecture = text("general.architecture")
        tokenizer, split = text("tokenizer.ggml.model"), text("tokenizer.ggml.pre")
        names = {tensor.name for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise ModelError(
            f"{path} is not a whole GGUF file ({said(error)}); download it again."
        ) from error
    if architecture is None or not stored:
        raise ModelError(f"{path} holds no model: it names no architecture, or has no tensors.")
    return Header(
        architecture,
        stored.most_common(1)[0][0],
        bool(set(stored) - {"F32", "F16", "BF16", "F64"}),
        tokenizer,
        split,
        tuple(_unread(architecture, set(fields), names, text)),
    )


def _unread(architecture: str, keys: set[str], tensors: set[str], text: Any) -> Iterator[str]:
    """What a file has and transformers passes over, though the model's numbers depend on it."""
    if "rope_freqs.weight" in tensors:
        yield "rope_freqs.weight (rotary frequencies scaled for long contexts)"
    kind = f"{architecture}.rope.scaling.type"
    if architecture not in ("gpt-oss", "gpt_oss") and text(kind) not in (None, "none"):
        yield f"{kind} = {text(kind)}"
    # Each architecture's config brings one value, and models of another size have another.
    if architecture in ("gemma2", "gemma3") and f"{architecture}.rope.scaling.factor" in keys:
        yield f"{architecture}.rope.scaling.factor = {text(f'{architecture}.rope.scaling.factor')}"


def supported() -> list[str]:
    """The architectures that the installed transformers reads, by llama.cpp's names."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    try:  # transformers' newer reader has architectures of its own
        from transformers.integrations.gguf import GGUF_ARCHS

        names |= set(GGUF_ARCHS)
    except ImportError:
        pass
    theirs = {theirs: ours for ours, theirs in SPELLED.items() if ours != "t5encoder"}
    return sorted(theirs.get(name, name) for name in names)


def read(path: Path, dtype: Any) -> Loaded:
    """A GGUF file as a plain transformers model with its tokenizer, its weights dequantised.

    Args:
        path: the file.
        dtype: what the weights become, a torch dtype or "auto" (float32 for quantised ones).

    Raises:
        ModelError: no whole GGUF file, or of an architecture that transformers can't read; the
            sentence names those that it can.
        MissingExtraError: a package that transformers needs for it is not installed.
    """
    file = path.expanduser().absolute()  # not resolved: the hub's cache links to hashes
    about = header(file)
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise ModelError(
            f"{file.name} is one part of a GGUF file, and transformers reads whole ones only; join "
            "the parts with llama.cpp's llama-gguf-split --merge."
        )
    if find_spec("accelerate") is None:
        raise MissingExtraError(
            "GGUF files need accelerate; install it with: pip install accelerate."
        )
    known = supported()
    if about.architecture not in known:
        raise ModelError(
            f"{file.name} is of the architecture {about.architecture}, which transformers can't "
            f"read from a GGUF file; it reads {', '.join(known)}."
        )
    module = _module(file, dtype, about)
    tokenizer, notes = _tokenizer(file, about, module)
    kind = str(next(module.parameters()).dtype).removeprefix("torch.")
    how = f"dequantised to {kind}" if about.is_quantised else f"read as {kind}"
    if about.unread:
        notes = (
            f"{file.name} has what transformers does not read, so its numbers may not be the "
            f"model's: {'; '.join(about.unread)}.",
            *notes,
        )
    return Loaded(module, tokenizer, f"{about.quantisation}, {how}", notes)


def _module(file: Path, dtype: Any, about: Header) -> Any:
    import transformers

    causal: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = dict(gguf_file=file.name)
    try:  # else weights stay in blocks where there is a kernel for them, and nobody can tap those
        from transformers.utils.quantization_config import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
            if config.model_type == "gpt2":  # it reads the context into a name that GPT-2 lost
                config.n_positions = getattr(config, "n_ctx", config.n_positions)
            module, info = causal.from_pretrained(
                str(file.parent), config=config, dtype=dtype, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{file.name} can't be read by transformers: {said(error)}.") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{file.name} lacks {len(missing)} tensors that a {about.architecture} has, "
            f"{missing[0]} among them; the file is not complete, or not of that architecture."
        )
    # The weights are plain now. What still says otherwise would keep them from being saved.
    module.hf_quantizer, module.is_quantized = None, False
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module.eval()


def _tokenizer(file: Path, about: Header, module: Any) -> tuple[Any, tuple[str, ...]]:
    """The file's tokenizer, mended where transformers reads it otherwise than llama.cpp, and
    remarks on it."""
    import transformers

    if about.tokenizer is None:
        return None, (f"{file.name} has no tokenizer; pass one to interp.load(tokenizer=…).",)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(file.parent), gguf_file=file.name
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        return None, (
            f"The tokenizer of {file.name} can't be read ({said(error)}); pass one to "
            "interp.load(tokenizer=…).",
        )
    limit = getattr(module.config, "max_position_embeddings", None)
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    _share_special_tokens(tokenizer, module)
    if about.split in SINGLE_DIGITS:
        from tokenizers import pre_tokenizers as pre

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre.Sequence(
            [
                pre.Digits(individual_digits=True),
                pre.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif about.tokenizer not in WITHOUT_SPLIT and not _knows_split(about.split):
        return tokenizer, (
            f"The tokenizer of {file.name} cuts text by the rule {about.split!r}, which is not "
            "known here; GPT-2's is taken, and some texts get other tokens.",
        )
    return tokenizer, ()


def _share_special_tokens(tokenizer: Any, module: Any) -> None:
    """The model ends a text where its tokenizer does: a GGUF file names those tokens with the
    tokenizer alone, and the config keeps its class's."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name, None)
        for settings in (module.config, getattr(module, "generation_config", None)):
            # Gemma 4's config has all three tokens that end a turn
            if settings is not None and not isinstance(getattr(settings, name, None), list):
                setattr(settings, name, token)


def _knows_split(split: str | None) -> bool:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an older transformers, which took the splits from its own tokenizers
        return True
    return split is None or split in AS_GPT2 or split in GGUF_PRE_TOKENIZER_SPLITS


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar but our own: transformers draws one for GGUF files that its switch does not reach."""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as reader

    transformers.utils.logging.disable_progress_bar()
    drawn = getattr(reader, "tqdm", None)
    if drawn is None:
        yield
        return
    reader.tqdm = lambda items, *_, **__: items
    try:
        yield
    finally:
        reader.tqdm = drawn


def said(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
