"""Where a result comes from: model, weights, versions, settings, machine."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from interp.support.fingerprint import fingerprint, package_code
from interp.support.jsonable import jsonable
from interp.support.weights import state_hash, weights_hash

if TYPE_CHECKING:
    import torch

    from interp_hooks.model import HookedModel

PACKAGES = ("interp", "torch", "transformers", "transformer-lens", "numpy", "triton")
#: what two runs must share to be the same run: what one saved, the other may go on with
IDENTITY = (
    *("model", "weights_hash", "state_hash", "inputs_hash", "settings", "seed"),
    *("active_edits", "code_hash", "versions", "kind"),
)
#: how these are called in a sentence
SAID = {
    "weights_hash": "weights",
    "state_hash": "configuration of the model",
    "inputs_hash": "inputs",
    "active_edits": "edits of a block around it",
    "code_hash": "code",
    "kind": "device",
}


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


def inputs_hash(inputs: Iterable[Any]) -> str:
    """SHA-256 over the inputs, in order: tensors with shape and type, and what else is given."""
    return fingerprint(*inputs)


def provenance(
    model: HookedModel,
    seed: int,
    settings: dict[str, Any],
    inputs: Sequence[Any],
    methods: Sequence[Any] = (),
) -> dict[str, Any]:
    """The record saved with every result.

    Its "fingerprint" is the digest of all that shapes the numbers (`IDENTITY`): weights, what the
    model computes with them, inputs, settings, the code of `methods` and of these packages,
    versions, edits that are active around the run.

    Args:
        model, seed, settings: of the run.
        inputs: tensors, and other data that the run reads (answers, spans).
        methods: the objects whose code and attributes make the numbers: scores, probes, a method.
    """
    config = getattr(model.module, "config", None)
    record: dict[str, Any] = dict(
        model=model.name,
        library=type(model.module).__module__.split(".")[0],
        architecture=type(model.module).__name__,
        revision=getattr(config, "_commit_hash", None),
        origin=dict(getattr(model, "origin", {})),
        before_text=before_text(model.tokenizer),
        weights_hash=weights_hash(model.module),
        state_hash=state_hash(model.module),
        dtype=str(next(model.module.parameters()).dtype).removeprefix("torch."),
        device=device_name(model.device),
        seed=seed,
        inputs_hash=inputs_hash(inputs),
        settings=settings,
        active_edits=active_edits(model),
        code_hash=fingerprint(package_code(), list(methods)),
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    record["fingerprint"] = fingerprint(identity(record))
    return record


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that two runs must share to be the same run, as JSON holds it."""
    # the number of threads may differ: it moves a number by its rounding alone
    kind = str(record.get("device", "")).partition(" (")[0]
    said = {key: record.get(key) for key in IDENTITY} | {"kind": kind}
    return json.loads(json.dumps(jsonable(said), sort_keys=True))


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two identities differ, in words: "seed, weights"; settings by their names."""
    names = []
    for key in IDENTITY:
        one, two = mine.get(key), other.get(key)
        if one == two:
            continue
        if key == "settings" and isinstance(one, dict) and isinstance(two, dict):
            names += sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
        else:
            names.append(SAID.get(key, key))
    return ", ".join(dict.fromkeys(names))


def active_edits(model: HookedModel) -> list[Any]:
    """The edits of blocks around a run, as JSON holds them or by their class and digest; what is
    measured inside them is a result of the edited model."""
    said: list[Any] = []
    for bound in model.observers_and_edits()[1]:
        edit: Any = getattr(bound, "edit", bound)
        entry = {"edit": type(edit).__name__, "digest": fingerprint(edit)}
        with suppress(Exception):  # an edit of one's own may have any form, or hold tensors
            entry = {**edit.to_json(), "digest": entry["digest"]}
            json.dumps(entry)
        said.append(jsonable(entry))
    return said


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
