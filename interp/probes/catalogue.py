"""Probes by name. A new probe is one file here and one line in this list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.probes.probe import Probe

registry: Registry[Probe] = Registry(
    "probe",
    "interp.probes",
    {
        "text": "interp.probes.text:TextProbe",
        "repeat": "interp.probes.text:RepeatProbe",
        "domains": "interp.probes.text:DomainsProbe",
        "question": "interp.probes.needle:QuestionProbe",
        "needle": "interp.probes.needle:NeedleProbe",
        "answer": "interp.probes.answer:AnswerProbe",
        "image": "interp.probes.image:ImageProbe",
        "named": "interp.probes.named:NamedProbe",
        "asked": "interp.probes.named:AskedProbe",
    },
    make=lambda cls: cls(),  # type: ignore[operator]
)


def get(name: str) -> Probe:
    """The probe called `name`.

    Raises:
        UnknownNameError: there is none.

    Example:
        >>> interp.probes.get("text").name
        'text'
    """
    return registry.get(name)


def names() -> list[str]:
    """Names of all probes.

    Example:
        >>> interp.probes.names()
        ['text', 'repeat', 'domains', 'question', 'needle', 'answer', 'image', 'named', 'asked']
    """
    return registry.names()
