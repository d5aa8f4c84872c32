"""How lm-evaluation-harness is to pose its documents: shots before each, a chat template around."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from interp.errors import InputError


@dataclass(frozen=True)
class Shots:
    """Shots and chat template of the harness's prompts, by its own names.

    Attributes:
        num_fewshot: solved documents before each; None for the task's own number.
        apply_chat_template: whether prompts are put into the tokenizer's chat template, or the name
            of one of its templates.
        fewshot_as_multiturn: each shot as turns of the chat; None as the harness has it, with a
            template.

    Raises:
        InputError: a negative number of shots, turns without a template.

    Example:
        >>> Shots(num_fewshot=2).record()
        {'num_fewshot': 2}
    """

    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"num_fewshot counts solved documents; {self.num_fewshot} can't be.")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise InputError("Shots are turns of a chat only with apply_chat_template.")

    def record(self) -> dict[str, Any]:
        """What was asked for, for the provenance."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def check(self, tokenizer: Any) -> None:
        """Raise `InputError` where the tokenizer lacks the template."""
        if not self.apply_chat_template:
            return
        template = getattr(tokenizer, "chat_template", None)
        if template is None:
            raise InputError(
                "This tokenizer has no chat template; set tokenizer.chat_template, or leave out "
                "apply_chat_template."
            )
        name = self.apply_chat_template
        if isinstance(name, str) and not (isinstance(template, dict) and name in template):
            has = ", ".join(template) if isinstance(template, dict) else "only one, without a name"
            raise InputError(f"This tokenizer has no chat template {name!r}; it has {has}.")

    def prepare(self, tasks: list[Any], seed: int) -> None:
        """Set the harness's task objects up, as its simple_evaluate does."""
        for task in tasks:
            own = task.get_config("num_fewshot")
            if own is None:
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            elif self.num_fewshot is not None and own != 0:  # 0 is a task's way to say never
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            task.set_fewshot_seed(seed=seed)

    def run_options(self) -> dict[str, Any]:
        """What the harness's evaluate is told."""
        turns = self.fewshot_as_multiturn
        return dict(
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=bool(self.apply_chat_template) if turns is None else turns,
        )
