from .check import Comparison as Comparison
from .check import ServeCheck as ServeCheck
from .check import check as check
from .settle import settled as settled
