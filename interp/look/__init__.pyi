from .look import Look as Look
from .look import View as View
from .why import Why as Why
