"""On how much a score was measured: the length of its inputs, and how many there were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """Tokens (shortest, longest) of the inputs that a score was measured on, and how many samples
    gave it a value; None where that is not recorded, or has no meaning (scores of weights).

    Prints "1,024 tokens, 16 samples".

    Example:
        >>> from interp.results.measured import Measured
        >>> str(Measured((1024, 1024), 16)), str(Measured())
        ('1,024 tokens, 16 samples', '')
    """

    tokens: tuple[int, int] | None = None
    samples: int | None = None

    def __str__(self) -> str:
        parts = []
        if self.tokens is not None:
            low, high = self.tokens
            parts.append(f"{low:,} tokens" if low == high else f"{low:,}–{high:,} tokens")
        if self.samples is not None:
            parts.append(f"{self.samples} sample{'' if self.samples == 1 else 's'}")
        return ", ".join(parts)

    @property
    def short(self) -> str:
        """ "1,024 × 16", tokens × samples; what is not recorded is left out."""
        low, high = self.tokens or (None, None)
        tokens = "" if low is None else f"{low:,}" if low == high else f"{low:,}–{high:,}"
        return " × ".join(p for p in (tokens, str(self.samples or "")) if p)

    def to_json(self) -> dict[str, Any]:
        """The entry of a score in a provenance's "measured"."""
        return {
            "tokens": None if self.tokens is None else list(self.tokens),
            "samples": self.samples,
        }

    @classmethod
    def of(cls, provenance: Mapping[str, Any], score: str) -> Measured:
        """What a provenance records of a score."""
        recorded = provenance.get("measured")
        entry = recorded.get(score) if isinstance(recorded, Mapping) else None
        if not isinstance(entry, Mapping):
            return cls()
        tokens = entry.get("tokens")
        return cls(None if tokens is None else (tokens[0], tokens[1]), entry.get("samples"))
