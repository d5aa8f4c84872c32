"""Typed errors of the tap; `interp.errors` adds its own and re-exports these."""

from __future__ import annotations


class InterpError(Exception):
    """Base of every error this toolkit raises on purpose. Its message is one helpful sentence."""

    def __str__(self) -> str:
        """In one line, also where it quotes what another library says in several."""
        return " ".join(super().__str__().split("\n")).strip()


class TapError(InterpError):
    """A model, layer or head whose attention can't be read or edited, with the reason."""


class EditError(InterpError, ValueError):
    """An edit that cannot apply to this model, or whose parameters are out of range."""


class InputError(InterpError, ValueError):
    """An input that cannot be used: empty text, wrong option, unusable tokenizer."""


class HeadError(InterpError, IndexError):
    """A head that does not exist in this model."""


class ContextError(InterpError, ValueError):
    """A context longer than the model's position limit."""


class ActivationError(InterpError, ArithmeticError):
    """NaN or infinity in a model's activations."""
