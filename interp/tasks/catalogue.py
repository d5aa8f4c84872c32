"""Tasks by name. A new task is one file here and one line in this list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.support.registry import Registry

if TYPE_CHECKING:
    from interp.tasks.task import Task

registry: Registry[Task] = Registry(
    "task",
    "interp.tasks",
    {
        "niah": "interp.tasks.niah:NeedleInAHaystack",
        "induction": "interp.tasks.induction:Induction",
        "ioi": "interp.tasks.ioi:IndirectObject",
        "greater_than": "interp.tasks.greater_than:GreaterThan",
        "docstring": "interp.tasks.docstring:Docstring",
        "colored_objects": "interp.tasks.colored_objects:ColoredObjects",
        "bigram_backcopy": "interp.tasks.bigram_backcopy:BigramBackcopy",
        "classification": "interp.tasks.classification:Classification",
        "pope": "interp.tasks.pope:Pope",
        "chair": "interp.tasks.chair:Chair",
    },
    make=lambda cls: cls(),  # type: ignore[operator]
)


#: endings of files that hold a task of one's own
FILES = (".json", ".jsonl")


def get(name: str) -> Task:
    """The task called `name`, with its default settings; or that of a file of one's own.

    A file (JSON Lines or a JSON list) holds {"text", "label"} rows, a classification, or {"input",
    "output"} rows, a relation learned in context.

    Raises:
        UnknownNameError: there is none.
        InputError: a file that holds no task.

    Example:
        >>> interp.tasks.get("ioi").judge
        'top1'
    """
    if not isinstance(name, str) or not name.endswith(FILES):
        return registry.get(name)
    from interp.tasks.labelled import Labelled
    from interp.tasks.relations import Relation
    from interp.tasks.rows import task_file

    return Labelled(name) if task_file(name) == ("text", "label") else Relation(name)


def names() -> list[str]:
    """Names of all tasks.

    Example:
        >>> "ioi" in interp.tasks.names()
        True
    """
    return registry.names()
