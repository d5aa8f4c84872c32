"""What tiny vision-language models are made of: sizes, a tokenizer of a few words, pictures, and a
stand-in for processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Made = tuple[Any, Any]  # the model, its processor
WORDS = (
    "describe the picture : what is in first second image a b c cat dog red blue left right top "
    "half and here are some crops to help you see better original"
).split()
VOCABULARY = 192
SIDE = 16  # of a tower's picture, in pixels; patches of 4
PROMPT = "describe the picture :"

TEXT: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=4,
)
SQUARE = dict(height=SIDE, width=SIDE)
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def tokenizer(special: Sequence[str] = (), **more: Any) -> Any:
    """A tokenizer of a few words and these special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for word in (*special, *WORDS):
        vocabulary.setdefault(word, len(vocabulary))
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        padding_side="left",
        **more,
    )
    return made


class Joined:
    """An image processor and a tokenizer joined as a processor joins them: each mark of an image in
    a text becomes its tokens, `expand(tokens of the image)`."""

    chat_template = None

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        mark: str,
        count: Callable[[dict[str, Any], int], str],
        ends: tuple[str, str] | None = None,
    ) -> None:
        self.image_processor, self.tokenizer, self.image_token = image_processor, tokenizer, mark
        self._tokens = count
        if ends is not None:
            self.vision_start_token, self.vision_end_token = ends

    def __call__(
        self, images: Any = None, text: Any = None, padding: bool = False, **more: Any
    ) -> dict[str, Any]:
        flat = [p for g in images for p in (g if isinstance(g, (list, tuple)) else [g])]
        tensors = dict(self.image_processor(images=flat, return_tensors="pt"))
        written, k = [], 0
        for line in [text] if isinstance(text, str) else text:
            first, *others = line.split(self.image_token)
            for other in others:
                first += self._tokens(tensors, k) + other
                k += 1
            written.append(first)
        tensors.pop("num_patches", None)
        tokens = self.tokenizer(written, padding=padding, return_tensors="pt")
        tensors.update(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        if "image_grid_thw" in tensors:
            image = self.tokenizer.convert_tokens_to_ids(self.image_token)
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == image).int()
        return tensors


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Any:
    """A picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hf_() -> Any:
    """transformers, imported when it is needed."""
    import transformers

    return transformers


@torch.no_grad()
def stir(module: torch.nn.Module, scale: float = 0.25) -> None:
    """Weights that make heads differ and attention peaky, the same for the same model."""
    generator = torch.Generator().manual_seed(3)
    for part in module.modules():
        if not isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            continue
        weight = part.weight
        weight.copy_((torch.randn(weight.shape, generator=generator) * scale).to(weight))
