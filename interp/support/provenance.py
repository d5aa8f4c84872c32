"""Where a result comes from: model, weights, versions, settings, machine."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from interp_hooks.model import HookedModel

PACKAGES = ("interp", "torch", "transformers", "transformer-lens", "numpy", "triton")
#: below this many parameters every byte is hashed, above it the first 4096 numbers of each tensor
WHOLE = 50_000_000


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters ("sampled:" where only their heads
    are read)."""
    import torch

    parameters = sorted(module.state_dict().items())
    whole = sum(p.numel() for _, p in parameters) < WHOLE
    digest = hashlib.sha256()
    for name, tensor in parameters:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        part = (flat if whole else flat[:4096]).cpu().contiguous()
        if part.numel():
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return ("" if whole else "sampled:") + digest.hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of the packages that shape a result, where installed."""
    by_package = {package: version_of(package) for package in PACKAGES}
    return {
        **{k: v for k, v in by_package.items() if v is not None},
        "python": platform.python_version(),
    }


def version_of(package: str) -> str | None:
    """A package's installed version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def inputs_hash(inputs: Iterable[torch.Tensor]) -> str:
    """SHA-256 over the inputs' values, in order."""
    digest = hashlib.sha256()
    for tensor in inputs:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def provenance(
    model: HookedModel, seed: int, settings: dict[str, Any], inputs: list[torch.Tensor]
) -> dict[str, Any]:
    """The record saved with every result."""
    config = getattr(model.module, "config", None)
    return dict(
        model=model.name,
        library=type(model.module).__module__.split(".")[0],
        architecture=type(model.module).__name__,
        revision=getattr(config, "_commit_hash", None),
        origin=dict(getattr(model, "origin", {})),
        before_text=before_text(model.tokenizer),
        weights_hash=weights_hash(model.module),
        dtype=str(next(model.module.parameters()).dtype).removeprefix("torch."),
        device=device_name(model.device),
        seed=seed,
        inputs_hash=inputs_hash(inputs),
        settings=settings,
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def before_text(tokenizer: Any) -> list[str] | None:
    """The special tokens that a tokenizer puts before every text, often one BOS, as "<s> (1)"; []
    for none, None without a tokenizer.

    They are a part of the inputs: the same weights behind a tokenizer that adds a BOS are measured
    on other rows, and have other sinks.
    """
    if tokenizer is None:
        return None
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    if not plain or plain[0] not in whole:
        return []
    ids = whole[: whole.index(plain[0])]
    return [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids]


def device_name(device: torch.device) -> str:
    """What ran it, in words."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
