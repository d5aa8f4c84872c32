"""Head mechanics: what heads do by their weights, what they write to the logits, and whether
attention agrees with attribution.

    from interp import mechanics
    mechanics.copying(model)   # OV and QK circuits: copying or anti-copying, matching or not
    mechanics.composition(model)       # Q-, K- and V-composition of every pair
    mechanics.direct_logits(model)     # each head's direct contribution to the answer
    mechanics.agreement(model)         # attention against gradient × input and integrated gradients
"""

from __future__ import annotations

from interp.mechanics.agreement import agreement
from interp.mechanics.attribution import attributions
from interp.mechanics.composition import composition
from interp.mechanics.logits import direct, direct_logits
from interp.mechanics.ov_qk import copying, ov_eigenvalues, ov_top_tokens, qk_eigenvalues

__all__ = [
    "agreement",
    "attributions",
    "composition",
    "copying",
    "direct",
    "direct_logits",
    "ov_eigenvalues",
    "ov_top_tokens",
    "qk_eigenvalues",
]
