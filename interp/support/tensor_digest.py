"""A digest of every number of a tensor, at the speed of reading it."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import ModelError

if TYPE_CHECKING:
    import torch

#: words of 8 bytes that one pair of sums is of
BLOCK = 1 << 14
#: blocks that are worked on together
ROWS = 64


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Digest of a tensor's type, shape and every number, of any dtype, layout and device.

    It is read where it is: for each block of 2¹⁴ words x of 8 bytes the two sums Σ xᵢ wᵢ and
    Σ ⌊xᵢ / 2³²⌋ wᵢ mod 2⁶⁴ with fixed odd wᵢ, and SHA-256 over the sums. Any change of one number
    is seen; several cancel with a chance of about 2⁻³³ or less. It is no defence against someone
    who makes weights to collide.

    Raises:
        ModelError: it has no values here.
    """
    import torch

    digest = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    if gather is not None:  # several processes share it out
        tensor = gather()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) is not torch.Tensor:  # torchao's and quanto's
        names, _ = flatten()
        digest.update(type(tensor).__qualname__.encode())
        for name in names:
            digest.update(name.encode() + tensor_digest(getattr(tensor, name)))
        return digest.digest()
    if tensor.device.type == "meta":
        raise ModelError(
            "The model has weights without values (on the device meta), so nothing says what a "
            "result is of; load it with its weights."
        )
    if tensor.is_quantized:
        digest.update(repr((tensor.qscheme(), _scales(tensor))).encode())
        tensor = tensor.int_repr()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel():
        raw = flat.view(torch.uint8)
        on_gpu = raw.device.type == "cuda"
        digest.update(_sums_cuda(raw) if on_gpu else _sums(raw.cpu().numpy()))
    return digest.digest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Digest (32 hex digits) of every byte of a file, in the same way.

    Raises:
        OSError: it can't be read.
    """
    size = os.path.getsize(path)
    raw = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return hashlib.sha256(f"{size} ".encode() + _sums(raw)).hexdigest()[:32]


def _scales(tensor: torch.Tensor) -> list[Any]:
    import torch

    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [
        tensor.q_per_channel_scales().tolist(),
        tensor.q_per_channel_zero_points().tolist(),
        tensor.q_per_channel_axis(),
    ]


def _factors() -> np.ndarray:
    """(BLOCK,) fixed odd numbers of 64 bits: splitmix64 of 1, 2, …"""
    x = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _sums(raw: np.ndarray) -> bytes:
    """The pair of sums of each block of bytes (n,), then the bytes that are left over."""
    factors, half = _factors(), np.uint64(32)
    count = len(raw) // 8
    words, rest = raw[: 8 * count].view(np.uint64), raw[8 * count :].tobytes()
    whole = count // BLOCK * BLOCK
    sums = []
    blocks = words[:whole].reshape(-1, BLOCK)
    for start in range(0, len(blocks), ROWS):
        part = blocks[start : start + ROWS]
        # a word's upper half alone: multiplied where it stands, its sign would be one bit of 64
        sums.append(np.stack([part @ factors, (part >> half) @ factors], 1).tobytes())
    last = words[whole:]
    ends = np.array([last @ factors[: len(last)], (last >> half) @ factors[: len(last)]])
    return b"".join(sums) + ends.astype(np.uint64).tobytes() + rest


def _sums_cuda(raw: torch.Tensor) -> bytes:
    """`_sums` where the numbers are: only sums leave the device."""
    import torch

    count = raw.numel() // 8
    if raw.storage_offset() % 8:
        raw = raw.clone()
    rest = raw[8 * count :].cpu().numpy().tobytes()
    words = raw[: 8 * count].view(torch.int64)
    factors = torch.from_numpy(_factors().view(np.int64)).to(raw.device)
    low = (1 << 32) - 1
    sums = []
    whole = count // BLOCK * BLOCK
    for part in (*words[:whole].view(-1, BLOCK).split(ROWS * 16), words[whole:].reshape(1, -1)):
        by = factors[: part.shape[1]]
        upper = (part >> 32) & low  # a shift of signed words keeps the sign
        sums.append(torch.stack([(part * by).sum(1), (upper * by).sum(1)], 1).cpu().numpy())
    return b"".join(s.tobytes() for s in sums) + rest
