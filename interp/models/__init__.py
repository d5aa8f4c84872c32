"""Which models `interp.load` knows by name: bundled ones (offline) and aliases of hub ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent

#: bundled name → folder here
BUNDLED = {"pocket-llama": "pocket_llama", "pocket-llava": "pocket_llava"}

#: shortcut → bundled name, and whose model the shortcut might have meant
SHORTCUTS = {
    "llama": ("pocket-llama", "Meta's: --model llama-3.1-8b"),
    "llava": ("pocket-llava", "the LLaVA of Liu et al.: --model llava-1.5-7b"),
}

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
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "paligemma-3b": "google/paligemma-3b-mix-224",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "gemma-3-4b": "google/gemma-3-4b-it",
}


@dataclass(frozen=True)
class Entry:
    """A name that `interp.load` takes: kind "bundled" or "alias", its target (folder or hub id), a
    note."""

    name: str
    kind: str
    target: str
    note: str = ""


def catalog() -> list[Entry]:
    """Bundled models with their shortcuts, then aliases."""
    entries = []
    for name, folder in BUNDLED.items():
        shortcuts = ", ".join(s for s, (target, _) in SHORTCUTS.items() if target == name)
        here = (
            "" if (FOLDER / folder / "model.safetensors").is_file() else " (not trained here yet)"
        )
        entries.append(
            Entry(name, "bundled", folder, f"shortcut: {shortcuts}; works offline{here}")
        )
    note = "downloaded from the hub when asked for"
    return entries + [Entry(name, "alias", target, note) for name, target in ALIASES.items()]
