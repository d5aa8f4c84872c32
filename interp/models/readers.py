"""What makes a model's input of pictures or of sound, in the folder of a model that reads these
alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from interp.errors import InputError

#: where transformers looks for one
FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Unreadable:
    """Stands for a processor that is there and can't be loaded: a model can be used without, and
    what needs it raises `InputError` with the reason."""

    reason: str

    def __call__(self, **inputs: Any) -> Any:
        raise InputError(self.reason)


def image_processor(target: str, name: str, revision: str | None, trust: bool) -> Any:
    """The image processor of a folder or hub id; None where there is none.

    Args:
        target: the folder or id.
        name: what sentences call the model.
        revision, trust: as in `interp.load`.
    """
    return _reader("AutoImageProcessor", "image processor", target, name, revision, trust)


def sound_reader(target: str, name: str, revision: str | None, trust: bool) -> Any:
    """The feature extractor of a model that hears, the same way."""
    return _reader("AutoFeatureExtractor", "feature extractor", target, name, revision, trust)


def hears(module: Any) -> bool:
    """Whether a model's main input is sound."""
    return getattr(module, "main_input_name", "") in ("input_features", "input_values")


def _reader(kind: str, called: str, target: str, name: str, revision: Any, trust: bool) -> Any:
    import transformers
    from transformers.utils import cached_file

    options: dict[str, Any] = dict(
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if all(cached_file(target, file, **options) is None for file in FILES):
        return None
    try:
        return getattr(transformers, kind).from_pretrained(
            target, revision=revision, trust_remote_code=trust
        )
    except Exception as error:  # its file may hold anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Unreadable(f"The {called} of {name} can't be loaded: {reason}")
