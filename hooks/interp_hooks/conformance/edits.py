"""The three edits that every architecture is tried with, at one site: a gain, ZeroTuning, ACT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from interp_hooks.call import AttentionCall, Site
from interp_hooks.edit import LiveEdit
from interp_kernels import Received, Request, Result, Rule, Steer


@dataclass(eq=False)
class AtSite(LiveEdit):
    """A change of one site's calls."""

    site: Site

    def at(self, site: Site) -> bool:
        return site == self.site

    def touches(self, call: AttentionCall) -> bool:
        return call.site == self.site


@dataclass(eq=False)
class Gain(AtSite):
    """z of one head times a factor."""

    head: int = 1
    factor: float = 0.25

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer:
        gain = torch.ones(1, call.site.n_heads, 1, device=call.value.device)
        gain[:, self.head] = self.factor
        return Steer(gain=gain)


@dataclass(eq=False)
class Initial(AtSite):
    """ZeroTuning: γ times the initial token's weight, rows renormalised."""

    gamma: float = 4.0

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer:
        first = call.mask.starts
        if first is None:
            first = torch.zeros(call.batch, dtype=torch.long, device=call.value.device)
        column = torch.arange(call.n_keys, device=call.value.device)
        labels = (column == first[:, None]).long()[:, None]  # (batch, 1, keys)
        keep = torch.tensor([[1.0, self.gamma]], device=call.value.device)
        return Steer(labels=labels, rule=Rule(keep, renormalise=True))


@dataclass(eq=False)
class Calibrated(AtSite):
    """ACT with the paper's threshold α / N."""

    beta: float = 0.4
    alpha: float = 1.2

    def steer(self, call: AttentionCall, measure: Callable[[Request], Result]) -> Steer:
        stats = measure(Request(received={"all": Received()}, out=False)).stats
        mean, count = stats["received:all"], stats["received_count:all"]
        device = mean.device
        real = count[:, 0] > 0  # no real row sees padding
        later = torch.arange(call.n_keys, device=device) > real.int().argmax(-1)[:, None]
        sinks = (mean > self.alpha / real.sum(-1)[:, None, None]) & later[:, None]
        keep = torch.tensor([[1.0, self.beta]], device=device)
        receive = torch.tensor([[1.0, 0.0]], device=device)
        return Steer(labels=sinks.long(), rule=Rule(keep, receive))
