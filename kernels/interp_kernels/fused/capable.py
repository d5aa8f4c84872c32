"""Where the kernels may run at all, and what to do where one turns out not to.

A device is looked at once. A kernel that does not compile for it, or asks for more shared memory
or registers than there are, raises `DoesNotRun` once a configuration; after that `refusal` says so
before anything is launched.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..call import Call
from .primitives import INTERPRETED

#: Triton versions the kernels are compiled and tested with: the first of them, and the first that
#: is none.
TRITON = ((3, 6), (3, 10))
#: The least compute capability: bf16 products, asynchronous copies.
CAPABILITY = (8, 0)

#: What Triton raises as a plain `RuntimeError` where a kernel does not compile for the device.
#: Errors of a running device ("an illegal memory access") are none of these.
_COMPILER = ("PassManager::run failed", "device kernel image is invalid", "no kernel image is")


class DoesNotRun(RuntimeError):
    """A kernel did not compile for this device, or does not fit it; the message says which."""


def usable(device: torch.device) -> str:
    """Why no kernel can run on tensors of this device, "" if they can."""
    if INTERPRETED and device.type != "cpu":
        return f"TRITON_INTERPRET=1 runs kernels on the CPU, and the tensors are on {device}"
    if not INTERPRETED and device.type != "cuda":
        return (
            f"it needs a CUDA GPU and the tensors are on {device} (TRITON_INTERPRET=1 runs it "
            "there, slowly, for tests)"
        )
    if why := of_triton(triton.__version__):
        return why
    return "" if INTERPRETED else _of_device(device)


@lru_cache
def _of_device(device: torch.device) -> str:
    return of_capability(torch.version.hip, torch.cuda.get_device_capability(device))


def of_capability(hip: str | None, capability: tuple[int, int]) -> str:
    """Why a GPU is none the kernels are made for, "" if it is; hip: of PyTorch's build."""
    if hip:
        return (
            f"the kernels are made for NVIDIA GPUs, and this PyTorch is built for AMD (HIP {hip}), "
            "where they do not compile"
        )
    if capability < CAPABILITY:
        return (
            f"the kernels want compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (A100) or newer, "
            f"and this GPU has {capability[0]}.{capability[1]}"
        )
    return ""


@lru_cache
def of_triton(version: str) -> str:
    """Why this Triton is none the kernels are tested with, "" if it is."""
    numbers = version.split("+")[0].split(".")[:2]
    (first, last), found = TRITON, tuple(int(n) for n in numbers if n.isdigit())
    if len(found) == 2 and first <= found < last:
        return ""
    low, high = (".".join(map(str, one)) for one in TRITON)
    return (
        f"the kernels are tested with Triton from {low} up to, but without, {high}, and Triton "
        f"{version} is installed"
    )


_REFUSED: dict[Hashable, str] = {}


def forget() -> None:
    """Every configuration is tried again."""
    _REFUSED.clear()


def refusal(call: Call) -> str:
    """Why a kernel of this call's configuration did not run before, "" if none is known not to."""
    return _REFUSED.get(configuration(call), "") if _REFUSED else ""


def refuse(call: Call, error: BaseException) -> str:
    """Remember that a kernel of this call's configuration does not run; why, in words."""
    lines = str(error).strip().splitlines() or [""]
    name = type(error).__name__
    why = f"a kernel for such calls does not run on this device ({name}: {lines[-1][:200]})"
    _REFUSED[configuration(call)] = why
    return why


def does_not_run(error: BaseException) -> bool:
    """Whether Triton could not compile or fit a kernel; nothing was launched then."""
    if isinstance(error, (OutOfResources, CompilationError, PTXASError)):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _COMPILER)


def configuration(call: Call) -> Hashable:
    """What decides which variants of which kernels a call compiles; lengths do not, but for few
    rows."""
    q, k, v, vis, steer, request = call.q, call.k, call.v, call.vis, call.steer, call.request
    tensors = (steer.temper, steer.bias, steer.labels, steer.blend, steer.gain)
    return (
        q.device,
        q.dtype,
        q.shape[3],
        v.shape[3],
        q.shape[1] // k.shape[1],
        min(vis.lq, 16),
        (vis.mask.causal, vis.mask.window is None, vis.keys is None, vis.rows is None),
        (vis.mask.dense is None or vis.mask.dense.dtype, vis.keep_first > 0),
        (call.softcap is None, call.sinks is None, steer.sigmoid is None),
        tuple(x is None for x in tensors),
        len(steer.spans),
        tuple((rule.groups, rule.renormalise, rule.receive is None) for rule in steer.rules),
        (request.names, request.n_groups, bool(request.pairs), request.topk),
        tuple(
            (one.reduce, one.band is None, one.keys is None, one.queries is None)
            for one in request.received.values()
        ),
        call.needs_grad(*steer.tensors) if steer.tensors else False,
    )
