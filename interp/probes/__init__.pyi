from .catalogue import get as get
from .catalogue import names as names
from .catalogue import registry as registry
from .probe import Probe as Probe
from .probe import ProbeBatch as ProbeBatch
from .settings import Settings as Settings
