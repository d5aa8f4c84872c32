"""A sampling loop of a diffusion model, with guidance by a class or text, and by heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from interp.errors import InputError
from interp.support.extras import need

if TYPE_CHECKING:
    from interp_hooks import HookedModel
    from interp_hooks.edit import Edit


@torch.no_grad()
def draw(
    model: Any,
    given: Mapping[str, torch.Tensor],
    null: Mapping[str, torch.Tensor] | None = None,
    guidance: float = 1.0,
    edits: Sequence[Edit] = (),
    weight: float = 0.0,
    steps: int = 25,
    seed: int = 0,
    scheduler: Any = None,
) -> torch.Tensor:
    """Draws pictures (or latents): a sampling loop from noise, (batch, channels, height, width).

    Each step predicts ε with what is `given`, and goes away from the prediction without it, and
    from the one in which heads are edited:

        ε = ε_given + (guidance − 1)·(ε_given − ε_null) + weight·(ε_given − ε_edited)

    The first is classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); the second, with
    `SoftPAG` on chosen heads, perturbed-attention guidance (Ahn et al. 2025, arXiv 2506.10978,
    HeadHunter). To have edited heads drawn, and not gone away from, put the call in a block of
    `model.edit`.

    Args:
        model: a diffusers transformer as a `HookedModel`, or what `interp.load` takes.
        given: what the forward takes of each picture: class_labels, encoder_hidden_states, ….
        null: the same of the unconditional prediction; needed where `guidance` is not 1.
        guidance: 1 is none.
        edits, weight: of the perturbed prediction; no weight, or no edits, is none.
        steps: of the scheduler.
        seed: of the noise.
        scheduler: one of diffusers'; None for rectified flow by Euler's method, pocket-dit's.

    Raises:
        InputError: no picture to draw, guidance without null, or a model that draws none.
        MissingExtraError: diffusers is not installed.

    Example:
        >>> dit = interp.load("dit")
        >>> red = {"class_labels": torch.tensor([0])}
        >>> picture = interp.diffusion.draw(dit, red, steps=8)[0]
        >>> interp.scenes.read_dots(picture.numpy()).color
        'red'
    """
    from interp.loading import load

    need("diffusers", extra="diffusion", what="Diffusion models")
    hooked = load(model)
    count = _batch(given)
    if guidance != 1 and null is None:
        raise InputError("Guidance by what is given needs null=, what stands for nothing given.")
    if scheduler is None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = _noise(hooked, count, seed) * getattr(scheduler, "init_noise_sigma", 1.0)
    perturbed = bool(edits) and weight != 0
    for t in scheduler.timesteps:
        ready = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        own = _predicted(hooked, ready, t, given)
        out = own
        if guidance != 1 and null is not None:
            out = out + (guidance - 1) * (own - _predicted(hooked, ready, t, null))
        if perturbed:
            with hooked.edit(*edits):
                out = out + weight * (own - _predicted(hooked, ready, t, given))
        x = scheduler.step(out, t, x).prev_sample
    return x


def _batch(given: Mapping[str, torch.Tensor]) -> int:
    sizes = {len(v) for v in given.values() if isinstance(v, torch.Tensor)}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            "What is given are tensors, (pictures, …), of as many pictures each: class_labels, or "
            "encoder_hidden_states."
        )
    return sizes.pop()


def _noise(model: HookedModel, count: int, seed: int) -> torch.Tensor:
    """(pictures, channels, side, side), the same on every device."""
    config = model.module.config
    channels, side = (getattr(config, n, None) for n in ("in_channels", "sample_size"))
    if channels is None or side is None or "timestep" not in model.accepts:
        raise InputError(f"{model.name} says no size of what it draws, so nothing can be drawn.")
    draw = torch.Generator().manual_seed(seed)
    shape = (side, side) if isinstance(side, int) else tuple(side)
    noise = torch.randn(count, channels, *shape, generator=draw)
    return noise.to(next(model.module.parameters()))


def _predicted(
    model: HookedModel, x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """What is predicted of the step, without variances that some models predict too."""
    name = "sample" if "sample" in model.accepts else "hidden_states"
    place = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    out = model(**{name: x}, timestep=t.expand(len(x)).to(model.device), **place)
    return out[0][:, : x.shape[1]]
