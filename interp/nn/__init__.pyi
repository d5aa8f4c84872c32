from .mixture_of_heads import MixtureOfHeads as MixtureOfHeads
from .selective_temperature import SelectiveTemperature as SelectiveTemperature
from .selective_temperature import selective as selective
from .sigma_reparam import SigmaReparam as SigmaReparam
from .sigma_reparam import fold as fold
from .sigma_reparam import reparametrise as reparametrise
