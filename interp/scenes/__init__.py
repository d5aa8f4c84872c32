"""Rendered scenes: pictures whose content is known, with a world in which some things go
together; and melodies, whose notes lie at known times."""

from interp.scenes.damage import damaged
from interp.scenes.render import SIZE, render
from interp.scenes.tones import NOTES, RATE, Melody, Note, melody, waveform
from interp.scenes.words import caption, mentions, question
from interp.scenes.world import COLORS, OBJECTS, PARTNER, Scene, Thing, broken, usual

__all__ = [
    "COLORS",
    "NOTES",
    "OBJECTS",
    "PARTNER",
    "RATE",
    "SIZE",
    "Melody",
    "Note",
    "Scene",
    "Thing",
    "broken",
    "caption",
    "damaged",
    "melody",
    "mentions",
    "question",
    "render",
    "usual",
    "waveform",
]
