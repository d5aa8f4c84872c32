"""What procedures that write text share: choosing tokens from logits, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.inputs.tokenizer import Text

if TYPE_CHECKING:
    from interp_hooks.model import HookedModel


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: greedily, or with `sample` from softmax(logits / temperature) cut to
    the `top_p` mass, seeded."""

    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError("A sampling temperature is above 0 and top_p between 0 and 1.")

    def generator(self) -> torch.Generator:
        """The random numbers of one text."""
        return torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(batch,) tokens from logits (batch, vocabulary)."""
        if not self.sample:
            return logits.argmax(-1)
        p = torch.softmax(logits.float().cpu() / self.temperature, -1)
        ranked, order = p.sort(-1, descending=True)
        ranked = torch.where(
            ranked.cumsum(-1) - ranked < self.top_p, ranked, 0
        )  # the first always stays
        places = torch.multinomial(ranked, 1, generator=generator)
        return order.gather(-1, places)[:, 0].to(logits.device)


def decode(
    first: torch.Tensor,
    step: Callable[[torch.Tensor], torch.Tensor],
    choice: Choice,
    max_new_tokens: int,
    stop: set[int],
    pad: int,
) -> torch.Tensor:
    """(batch, new) tokens: `first` are logits (batch, vocabulary) after the prompt, `step(tokens
    (batch,))` gives the next ones. A row that met a token of `stop` goes on with `pad`; the text
    ends when all have."""
    if max_new_tokens < 1:
        raise InputError("A text needs at least one new token; use max_new_tokens ≥ 1.")
    generator, logits, columns = choice.generator(), first, []
    over = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    ends = torch.tensor(sorted(stop), device=first.device, dtype=torch.long)
    for i in range(max_new_tokens):
        tokens = torch.where(over, pad, choice(logits, generator))
        columns.append(tokens)
        over = over | torch.isin(tokens, ends)
        if i + 1 == max_new_tokens or bool(over.all()):
            break
        logits = step(tokens)
    return torch.stack(columns, 1)


def token_ids(model: HookedModel, text: Any, start: bool) -> list[int]:
    """Text, token ids or a (1, tokens) tensor as a list of ids; `start`: with the tokenizer's
    BOS."""
    if isinstance(text, str):
        reader = Text(model.tokenizer)
        return reader.prompt(text) if start else reader.encode(text)
    if isinstance(text, torch.Tensor):
        if text.ndim == 2 and len(text) > 1:
            raise InputError("This procedure takes one text at a time, not a batch.")
        return [int(i) for i in text.flatten().tolist()]
    return [int(i) for i in text]


def check_procedure(model: HookedModel, name: str) -> None:
    """Raise `InputError` unless the model has a cache that a procedure can use."""
    if not model.has_cache:
        raise InputError(f"{name} needs a model with a key-value cache, and {model.name} has none.")
