"""Head mechanics: what heads do by their weights, what they write to the logits, and whether
attention agrees with attribution.

    from interp import mechanics
    mechanics.copying(model)           # OV and QK circuits: copying, matching, or their opposites
    mechanics.composition(model)       # Q-, K- and V-composition of every pair
    mechanics.direct_logits(model)     # each head's direct contribution to the answer
    mechanics.agreement(model)         # attention against gradient × input and integrated gradients
"""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
