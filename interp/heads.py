"""What users name of a model's inside: heads, and the modules of an architecture."""

from interp_hooks.heads import Head as Head
from interp_hooks.heads import parse_heads as parse_heads
from interp_hooks.huggingface.layout import Layout as Layout
