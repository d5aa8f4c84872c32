"""Rendered scenes: pictures whose content is known, with a world in which some things go
together; melodies, whose notes lie at known times; and dots, which can be counted."""

from interp.scenes.damage import damaged
from interp.scenes.dots import DOT_COLORS, Dots, Read, dots, draw_dots, read_dots
from interp.scenes.render import SIZE, render
from interp.scenes.tones import NOTES, RATE, Melody, Note, melody, waveform
from interp.scenes.words import caption, mentions, question
from interp.scenes.world import COLORS, OBJECTS, PARTNER, Scene, Thing, broken, usual

__all__ = [
    "COLORS",
    "DOT_COLORS",
    "NOTES",
    "OBJECTS",
    "PARTNER",
    "RATE",
    "SIZE",
    "Dots",
    "Melody",
    "Note",
    "Read",
    "Scene",
    "Thing",
    "broken",
    "caption",
    "damaged",
    "dots",
    "draw_dots",
    "melody",
    "mentions",
    "question",
    "read_dots",
    "render",
    "usual",
    "waveform",
]
