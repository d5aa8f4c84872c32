from .probe import PROBES as PROBES
from .probe import Probe as Probe
from .probe import ProbeBatch as ProbeBatch
from .probe import Settings as Settings
