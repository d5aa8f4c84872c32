"""Head mechanics: what heads do by their weights, what they write to the logits, and whether
attention agrees with attribution.

    from interp import mechanics
    mechanics.copying(model)           # OV and QK circuits: copying, matching, or their opposites
    mechanics.composition(model)       # Q-, K- and V-composition of every pair
    mechanics.direct_logits(model)     # each head's direct contribution to the answer
    mechanics.qk_attribution(model, ids, head, query, key)  # who built one attention score
    mechanics.sources(model, ids, direction)                # which token, by which head, on a logit
    mechanics.agreement(model)         # attention against five attributions of the answer
    mechanics.cross_agreement(model, samples)  # the same of cross-attention: speech, translation
"""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
