from . import planted as planted
