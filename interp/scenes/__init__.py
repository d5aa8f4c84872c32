"""Rendered scenes: pictures whose content is known, with a world in which some things go
together."""

from interp.scenes.damage import damaged
from interp.scenes.render import SIZE, render
from interp.scenes.words import caption, mentions, question
from interp.scenes.world import COLORS, OBJECTS, PARTNER, Scene, Thing, broken, usual

__all__ = [
    "COLORS",
    "OBJECTS",
    "PARTNER",
    "SIZE",
    "Scene",
    "Thing",
    "broken",
    "caption",
    "damaged",
    "mentions",
    "question",
    "render",
    "usual",
]
