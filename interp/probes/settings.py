"""What a scan fixes for all probes."""

from __future__ import annotations

from dataclasses import dataclass

from interp.vision.pictures import Pictures


@dataclass(frozen=True)
class Settings:
    """What a scan fixes for all probes.

    Args:
        context: tokens of the text rows and the longest needle prompt.
        samples: rows or problems a probe.
        seed: of the rows and problems.
        text: what text rows are cut from; None for the generated prose.
        images: a folder of pictures; None for rendered scenes.
        prompt: what is asked about each picture; None for the usual one.

    Example:
        >>> interp.probes.Settings(context=64).samples
        16
    """

    context: int = 1024
    samples: int = 16
    seed: int = 0
    text: str | None = None
    images: str | None = None
    prompt: str | None = None

    @property
    def pictures(self) -> Pictures:
        """The pictures that image scores are measured on."""
        return Pictures(self.samples, self.seed, self.images, self.prompt)
