from .sigma_reparam import SigmaReparam as SigmaReparam
from .sigma_reparam import fold as fold
from .sigma_reparam import reparametrise as reparametrise
