from .catalogue import get as get
from .catalogue import names as names
from .catalogue import registry as registry
from .task import Batch as Batch
from .task import Instance as Instance
from .task import Task as Task
from .task import collate as collate
