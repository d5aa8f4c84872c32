"""Which heads do a task: ``interp.circuits.find(model, task="ioi", method="discrete_sae")``.

Every method gives the same kind of table, a number a head, so that methods can be compared with
each other and with the truth (`evaluate`), checked on the model itself (`faithfulness`) and joined
with an atlas.
"""

from interp.support.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
