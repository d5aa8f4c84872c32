from .cache import Cached as Cached
from .cache import cached as cached
from .cache import remove as remove
from .catalogue import Entry as Entry
from .catalogue import catalog as catalog
from .fetch import get as get
from .names import FOLDER as FOLDER
