"""A tokenizer of whole words, for models with a small vocabulary of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokenizer_of(words: Sequence[str]) -> Any:
    """A transformers tokenizer of these words, ids in order; `words[0]` is put before every text.

    A word that it doesn't have becomes `words[0]` too.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos = words[0]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=bos))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, unk_token=bos)
