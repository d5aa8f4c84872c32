"""Heads by name: `interp.Head` and what reads lists of them."""

from interp_hooks.heads import Head as Head
from interp_hooks.heads import parse_heads as parse_heads
