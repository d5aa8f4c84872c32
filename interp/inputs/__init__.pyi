from .context import check_context as check_context
from .forward import forward as forward
from .text import text_rows as text_rows
