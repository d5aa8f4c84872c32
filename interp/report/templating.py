"""Templates of the report: HTML, style and script lie as files in `templates`, beside this one."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from interp.report.heatmap import number

if TYPE_CHECKING:
    from jinja2 import Environment


def rendered(template: str, **values: Any) -> str:
    """HTML of a template with these values, each escaped unless the template marks it as safe."""
    return _environment().get_template(template).render(values)


def asset(name: str) -> str:
    """Text of a file in `templates` as it stands: the style, the script."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _environment() -> Environment:
    """Where templates are looked up; a value that a template names and nobody gives is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("interp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    # Jinja2 sorts keys unless told otherwise; the page draws figures in the order given.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
