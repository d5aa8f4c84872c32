"""Where a model's weights go and what they are stored as: device, dtype, device map,
quantisation."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import InputError, MissingExtraError, ModelError

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: accelerate's ways to spread a model over devices
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
#: name → (package, what it is called there)
QUANTIZATIONS = {
    "8bit": ("bitsandbytes", "load_in_8bit"),
    "4bit": ("bitsandbytes", "load_in_4bit"),
    "int8": ("torchao", "Int8WeightOnlyConfig"),
    "int4": ("torchao", "Int4WeightOnlyConfig"),
    "quanto-int8": ("optimum.quanto", "int8"),
    "quanto-int4": ("optimum.quanto", "int4"),
}
#: package → what pip calls it
WHEELS = {"optimum.quanto": "optimum-quanto"}


@dataclass(frozen=True)
class Place:
    """What `from_pretrained` is told.

    Attributes:
        dtype: of torch, or "auto".
        device: where the model is moved afterwards; None where accelerate has placed it.
        options: keyword arguments.
    """

    dtype: Any
    device: str | None
    options: dict[str, Any] = field(default_factory=dict)


def plan(device: str, dtype: Any, device_map: Any, quantization: Any) -> Place:
    """Options of `interp.load` as a `Place`. Raises `InputError`, `ModelError` or
    `MissingExtraError`."""
    import torch

    if device_map is not None and device != "auto":
        raise InputError(
            f"device={device!r} and device_map={device_map!r} both say where the model goes; give "
            "one of them."
        )
    target = device_of(device)
    if isinstance(device_map, str) and device_map not in SPREADS:
        device_map = {"": device_of(device_map)}
    default = "auto" if target.startswith("cuda") else torch.float32
    options: dict[str, Any] = {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
        device_map = {"": target} if device_map is None else device_map
    if device_map is not None:
        if not isinstance(device_map, (str, Mapping)):
            raise InputError(
                f"A device map is a word (auto, balanced, sequential) or module → device, not "
                f"{device_map!r}."
            )
        require("accelerate", "device_map and quantization need")
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
        if isinstance(device_map, str) or "disk" in device_map.values():
            options["offload_folder"] = tempfile.mkdtemp(prefix="interp-offload-")
    return Place(
        default if dtype is None else dtype_of(dtype),
        target if device_map is None else None,
        options,
    )


def keep_with(module: Any, place: Place) -> None:
    """What is offloaded to disk lies there as long as the model lives."""
    folder = place.options.get("offload_folder")
    if folder is None:
        return
    if module is None or not any(Path(folder).iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        weakref.finalize(module, shutil.rmtree, folder, ignore_errors=True)


def device_of(device: Any) -> str:
    """A device's name, "auto" resolved. Raises `ModelError` for one that is not here."""
    import torch

    device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{device!r} is not a device; use auto, cpu or cuda.") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("There is no CUDA device here; use --device cpu.")
    return device


def dtype_of(dtype: Any) -> Any:
    """A torch dtype by its name; "auto" stays. Raises `ModelError` for one that a model can't
    have."""
    import torch

    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return name
    if name not in DTYPES:
        raise ModelError(f"{name!r} is not a dtype for a model; use float32, bfloat16 or float16.")
    return getattr(torch, name)


def renamed_dtype(dtype: Any, torch_dtype: Any) -> Any:
    """`dtype`, or what was given under its old name, with a warning. Raises `InputError` where both
    are."""
    if torch_dtype is None:
        return dtype
    if dtype is not None:
        raise InputError("torch_dtype is the old name of dtype; give dtype alone.")
    warnings.warn("torch_dtype is called dtype now; it is taken as that.", stacklevel=3)
    return torch_dtype


def refuse_for_objects(**options: Any) -> None:
    """Raise `InputError` for an option that can't change a model that is loaded already."""
    for name, value in options.items():
        if value is not None:
            raise InputError(
                f"{name}= is for names and folders: a loaded model stays as it is, so load it with "
                f"{name} yourself, or give its name."
            )


def refuse_for_gguf(name: str, **options: Any) -> None:
    """Raise `InputError` for what a GGUF file, whose weights are dequantised here, does not
    take."""
    for option, value in options.items():
        if value is not None:
            raise InputError(
                f"{name} is a GGUF file: its weights are dequantised on one device, without "
                f"{option}."
            )


def refuse_for_drawing(name: str, **options: Any) -> None:
    """Raise `InputError` for what a model of diffusers does not take here."""
    for option, value in options.items():
        if value is not None:
            raise InputError(
                f"{name} is a model of diffusers, which is loaded on one device, without {option}; "
                "load it with diffusers and give the object."
            )


def quantization_config(quantization: Any) -> Any:
    """A quantisation config of transformers, by its short name; an object is given back. Raises
    `InputError` for no such name, `MissingExtraError` without its package."""
    if not isinstance(quantization, str):
        if hasattr(quantization, "quant_method"):
            return quantization
        raise InputError(
            f"quantization is one of {', '.join(QUANTIZATIONS)}, or a quantisation config of "
            f"transformers, not a {type(quantization).__name__}."
        )
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"There is no quantisation {quantization!r}; there are {', '.join(QUANTIZATIONS)}."
        )
    import transformers

    package, word = QUANTIZATIONS[quantization]
    require(package, f"quantization={quantization!r} needs")
    if package == "bitsandbytes":
        return transformers.BitsAndBytesConfig(**{word: True})
    if package == "torchao":
        configs = importlib.import_module("torchao.quantization")
        return transformers.TorchAoConfig(getattr(configs, word)())
    return transformers.QuantoConfig(weights=word)


def require(package: str, who: str) -> None:
    """Raise `MissingExtraError` where a package is not installed."""
    try:
        there = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        wheel = WHEELS.get(package, package)
        raise MissingExtraError(f"{who} the package {wheel}: pip install {wheel}.")


def missing_package(error: ImportError) -> MissingExtraError:
    """What to say of a package that transformers found missing while it loaded a model."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MissingExtraError(f"A package that this model needs can't be used here: {first}")
