from . import reuse as reuse
