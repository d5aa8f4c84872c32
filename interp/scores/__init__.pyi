from .catalogue import get as get
from .catalogue import names as names
from .catalogue import registry as registry
from .catalogue import select as select
from .score import Score as Score
