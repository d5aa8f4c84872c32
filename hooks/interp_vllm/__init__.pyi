from .client import HeadStatistics as HeadStatistics
from .client import asking as asking
from .client import statistics as statistics
from .errors import ServingError as ServingError
from .program import EDITS as EDITS
from .settings import STATISTICS as STATISTICS
from .settings import Asked as Asked
from .settings import Settings as Settings
