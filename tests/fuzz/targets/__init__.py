"""What is fuzzed, a file a target; the line here is its registration."""

from __future__ import annotations

from ..target import Target
from .command_line import CommandLine
from .edit_json import EditJson
from .folders import Folders
from .gguf_files import GgufFiles
from .kernel_calls import KernelCalls
from .rows_files import PromptFiles, TaskFiles
from .score_files import ScoreFiles

TARGETS: dict[str, type[Target]] = {
    "kernels": KernelCalls,
    "edits": EditJson,
    "scores": ScoreFiles,
    "folders": Folders,
    "prompts": PromptFiles,
    "tasks": TaskFiles,
    "cli": CommandLine,
    "gguf": GgufFiles,
}
#: how often each is run, of 100 inputs
SHARE = dict(kernels=23, edits=21, scores=20, folders=13, prompts=10, tasks=9, cli=3, gguf=1)
