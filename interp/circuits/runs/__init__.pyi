from . import prompts as prompts
