"""Melodies as sound: notes whose place in time is known, among bursts of noise without a name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Names of the notes, and the frequency of each in Hz: an octave from C5, in equal temperament.
NOTES = {
    name: 523.25 * 2 ** (step / 12)
    for name, step in zip(
        ("do", "re", "mi", "fa", "sol", "la", "si"), (0, 2, 4, 5, 7, 9, 11), strict=True
    )
}
#: Samples a second, and seconds of a melody.
RATE, SECONDS = 16_000, 3.0
#: seconds of a note, and of the silence before it
_LONG, _REST = (0.12, 0.36), (0.03, 0.3)
#: amplitude of a note, of a burst, and of the noise that is everywhere
_LOUD, _BURST, _HISS = (0.1, 0.5), (0.05, 0.3), (0.001, 0.01)
#: share of sounds that are bursts of noise, which have no name
_BURSTS = 0.2
_FADE = 0.01


@dataclass(frozen=True)
class Note:
    """A sound from `start` to `end`, in seconds; `name` is None for a burst of noise.

    Example:
        >>> interp.scenes.Note("do", 0.5, 0.7).name
        'do'
    """

    name: str | None
    start: float
    end: float


@dataclass(frozen=True)
class Melody:
    """Sounds in the order of time.

    Example:
        >>> interp.scenes.melody(0).text
        're mi fa si sol si'
    """

    sounds: tuple[Note, ...]
    seed: int

    @property
    def notes(self) -> tuple[Note, ...]:
        """The sounds that have a name."""
        return tuple(s for s in self.sounds if s.name is not None)

    @property
    def text(self) -> str:
        """The names, as a transcript has them."""
        return " ".join(str(n.name) for n in self.notes)


def melody(seed: int) -> Melody:
    """A melody of 3 seconds drawn from `seed`: notes .12 to .36 s long, one sound in five noise.

    Example:
        >>> interp.scenes.melody(1) == interp.scenes.melody(1)
        True
    """
    rng = np.random.default_rng([2, seed])
    names, sounds = list(NOTES), list[Note]()
    wanted = int(rng.integers(1, 11))  # sounds that fit
    time = float(rng.uniform(0, 1) ** 2)
    while len(sounds) < wanted:
        start = time + float(rng.uniform(*_REST))
        time = start + float(rng.uniform(*_LONG))
        if time > SECONDS:
            break
        named = not sounds or rng.random() >= _BURSTS
        sounds.append(Note(str(rng.choice(names)) if named else None, start, time))
    return Melody(tuple(sounds), seed)


def waveform(melody: Melody) -> np.ndarray:
    """(48000,) float32: the melody at 16 kHz. Notes have up to three overtones, and all is in hiss.

    Example:
        >>> interp.scenes.waveform(interp.scenes.melody(0)).shape
        (48000,)
    """
    rng = np.random.default_rng([3, melody.seed])
    wave = rng.normal(0, rng.uniform(*_HISS), int(RATE * SECONDS))
    for sound in melody.sounds:
        first, last = int(sound.start * RATE), int(sound.end * RATE)
        t = np.arange(last - first) / RATE
        if sound.name is None:
            tone = rng.uniform(*_BURST) * rng.normal(0, 1, len(t))
        else:
            phase = 2 * np.pi * NOTES[sound.name] * t + rng.uniform(0, 2 * np.pi)
            overtones = rng.uniform(0, 0.4, 3)
            tone = np.sin(phase) + sum(a * np.sin((n + 2) * phase) for n, a in enumerate(overtones))
            tone = rng.uniform(*_LOUD) * tone
        fade = np.minimum(1, np.minimum(t, t[::-1]) / _FADE)  # without a click at either end
        wave[first:last] += tone * fade
    return wave.astype(np.float32)
