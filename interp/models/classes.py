"""Which class of transformers a checkpoint is loaded as."""

from __future__ import annotations

from typing import Any

#: where a config is looked up when its checkpoint names no class that is known, in this order
AUTOMATIC = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
)


def class_of(config: Any, trust_remote_code: bool = False) -> Any:
    """The class that saved the checkpoint, by `config.architectures`: with the head it was trained
    with (`BertForMaskedLM`, `ViTForImageClassification`, `BartForConditionalGeneration`). Without
    one the language model of the config, if it has one, else its bare model.

    Args:
        config: of `AutoConfig.from_pretrained`.
        trust_remote_code: whether the checkpoint's own code may be run, which then decides.

    Example:
        >>> import transformers
        >>> class_of(transformers.BertConfig(architectures=["BertForMaskedLM"])).__name__
        'BertForMaskedLM'
    """
    import transformers

    own_code = trust_remote_code and getattr(config, "auto_map", None)
    for name in () if own_code else getattr(config, "architectures", None) or ():
        kind = getattr(transformers, str(name), None)
        known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        bare = str(name).endswith("Model") and _ties_its_words(config)
        if known and getattr(kind, "config_class", None) is type(config) and not bare:
            return kind
    return _automatic(config) or transformers.AutoModel


def _ties_its_words(config: Any) -> bool:
    """Whether the config is of a decoder whose unembedding is its embedding, so that a bare model's
    weights hold the language model."""
    import transformers

    decodes = type(config) in transformers.AutoModelForCausalLM._model_mapping
    fills_in = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    return decodes and not fills_in and bool(getattr(config, "tie_word_embeddings", False))


def _automatic(config: Any) -> Any:
    """The automatic class for language models that has this config; None without."""
    import transformers

    for name in AUTOMATIC:
        kind = getattr(transformers, name)
        if type(config) in kind._model_mapping:
            return kind
    return None
