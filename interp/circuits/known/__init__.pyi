from . import constructed as constructed
from . import planted as planted
