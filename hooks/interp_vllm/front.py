"""The side of an engine that takes requests: what they ask is checked there, and salted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

from interp_hooks.errors import InterpError
from interp_vllm import guards
from interp_vllm.errors import ServingError
from interp_vllm.program import checked
from interp_vllm.reading import reader
from interp_vllm.served import ServedModel
from interp_vllm.settings import Settings

#: the key of a request's settings among its `extra_args`
KEY = "interp"


def admitted(value: Any, model: ServedModel, tokens: Sequence[int]) -> Settings:
    """What a request asks, checked, its texts found among its tokens.

    Args:
        value: `extra_args["interp"]`, JSON or its text.
        model: the whole model.
        tokens: the prompt's.

    Raises:
        ServingError: what is not served.
        EditError, HeadError: an edit that does not fit the model.
    """
    settings = Settings.read(value)
    entries = [_placed(dict(entry), model, tokens) for entry in settings.edits]
    return checked(Settings(tuple(entries), settings.asked), model)


def _placed(entry: dict[str, Any], model: ServedModel, tokens: Sequence[int]) -> dict[str, Any]:
    """An edit's JSON with a text of the prompt as its positions."""
    keys = entry.get("keys")
    if not isinstance(keys, str) or not keys.startswith("text:"):
        return entry
    text = keys.removeprefix("text:")
    if model.tokenizer is None:
        raise ServingError(
            f"The engine has no tokenizer to find the text {text!r} with; name its positions."
        )
    place = reader().span_of(text, model.tokenizer, tokens)
    if place is None:
        raise ServingError(f"The text {text!r} does not occur in the prompt.")
    return {**entry, "keys": f"{place[0]}:{place[1]}"}


def check_request(processor: Any, request: Any) -> Any:
    """An engine's request with its settings checked and its cache salted; itself where it asks
    nothing.

    Raises `ServingError` for settings that would be passed over or not be served.
    """
    params = request.sampling_params
    value = None if params is None else (params.extra_args or {}).get(KEY)
    if value is None:
        return request
    config = processor.vllm_config
    if not guards.enabled(config):
        raise ServingError(
            "This engine was not started for edits and statistics of heads; start it with "
            f"{guards.ENABLED}."
        )
    from interp_vllm.worker import served

    tokens = request.prompt_token_ids
    if tokens is None:
        raise ServingError("A prompt of embeddings has no tokens for edits and statistics.")
    settings = admitted(value, served(config, processor.tokenizer), tokens)
    if getattr(request, "resumable", False):
        raise ServingError(
            "A prompt that comes in parts has no end yet, which edits and statistics go by; send "
            "it whole."
        )
    if settings.asked is not None and params.n > 1:
        raise ServingError(
            f"Statistics are of one sequence, and this request asks for {params.n}; send it "
            "several times."
        )
    params.extra_args = {**params.extra_args, KEY: settings.text()}
    salts = [salt for salt in (request.cache_salt, settings.salt) if salt]
    request.cache_salt = "|".join(salts) or None
    return request


def install(processor: type) -> None:
    """Puts the check in front of an engine's input processor, once."""
    if getattr(processor, "_interp", False):
        return
    processor._interp = True  # type: ignore[attr-defined]
    made, process = processor.__init__, processor.process_inputs  # type: ignore[misc, attr-defined]

    @wraps(made)
    def init(self: Any, vllm_config: Any, *args: Any, **settings: Any) -> None:
        if guards.enabled(vllm_config):
            from vllm import __version__

            guards.check_version(__version__)
            guards.check_config(vllm_config)
        made(self, vllm_config, *args, **settings)

    @wraps(process)
    def process_inputs(self: Any, *args: Any, **settings: Any) -> Any:
        request = process(self, *args, **settings)
        try:
            return check_request(self, request)
        except InterpError as error:
            raise _refusal(error) from error

    processor.__init__ = init  # type: ignore[misc]
    processor.process_inputs = process_inputs  # type: ignore[attr-defined]


def _refusal(error: InterpError) -> Exception:
    """The error as the engine answers it to a client: a bad request."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=KEY)
