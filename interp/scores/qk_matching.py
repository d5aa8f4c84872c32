"""Matching by the QK circuit, from weights alone."""

from __future__ import annotations

from interp.scores.ov_copying import OVCopying


class QKMatching(OVCopying):
    """Σλ / Σ|λ| over the eigenvalues λ of W_E W_Q W_Kᵀ W_Eᵀ, norm gains folded in, positions left
    out.

    Misleads:
        Positions are left out, so a head that works by position shows nothing of it. Tokens are
        taken from the embedding, which later layers no longer see alone.
    """

    name = "qk_matching"
    title = "QK matching"
    reading = (
        "Near 1 a head attends to tokens like the query's, near −1 away from them; positions "
        "are left out."
    )
    formula = "Σλ / Σ|λ|, λ the eigenvalues of W_E W_Q W_Kᵀ W_Eᵀ"

    circuit = 1
    matrices = ("W_Q", "W_K")
