from .draw import draw as draw
from .hunt import Hunt as Hunt
from .hunt import hunt as hunt
