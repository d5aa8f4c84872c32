from .mixture_of_heads import MixtureOfHeads as MixtureOfHeads
from .sigma_reparam import SigmaReparam as SigmaReparam
from .sigma_reparam import fold as fold
from .sigma_reparam import reparametrise as reparametrise
