"""`interp`: the command line's entry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from interp.cli import (
    ablate,
    bench,
    bench_circuits,
    calibrate,
    catalogue,
    check,
    circuit,
    compare,
    compress,
    evaluate,
    export,
    generate,
    look,
    models,
    plan,
    scan_heads,
    serve_check,
    show,
    why,
)
from interp.cli.common import fail
from interp.support.memory import is_out_of_memory

OUT_OF_MEMORY = (
    "Out of memory: use fewer or shorter inputs, --dtype bfloat16 or a device with more memory"
)
KEPT = "; what was already measured is kept, and the same command resumes"
#: the commands that save what is finished and go on from there
RESUMING = ("scan-heads", "calibrate", "bench-circuits")


def explained(command: Callable[..., None], resumes: bool = False) -> Callable[..., None]:
    """A subcommand whose foreseeable errors end in one sentence and exit code 2, an interrupt in
    130.

    Around each subcommand rather than around the app, because typer makes "Aborted!" of an
    interrupt before the app's caller sees it.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        show_every_character()
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            usual = "Interrupted; run the same command again to resume."
            kept = next((a for a in interrupt.args if isinstance(a, str)), None)
            fail(kept or (usual if resumes else "Interrupted."), mark="")
            raise typer.Exit(130) from None
        except Exception as error:
            sentence = explain(error, resumes)
            if sentence is None:
                raise
            fail(sentence)
            raise typer.Exit(2) from None

    return run


def show_every_character() -> None:
    """Lets stdout print what is no character of its encoding, as an escape: half a character of a
    name that is not UTF-8, or a Greek letter on a terminal of Latin-1. stderr does so by itself."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def explain(error: BaseException, resumes: bool = False) -> str | None:
    """The sentence for an error that a user can do something about; None for a bug, which keeps its
    traceback."""
    from interp.errors import InterpError

    if isinstance(error, InterpError):
        return str(error)
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY}{KEPT if resumes else ''}."
    return None


app = typer.Typer(
    name="interp",
    help="See and steer every attention head of a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        import interp

        typer.echo(f"interp {interp.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """See and steer every attention head of a model."""


_COMMANDS: dict[str, Callable[..., None]] = {
    "list": catalogue.show_names,
    "plan": plan.plan,
    "scan-heads": scan_heads.scan_heads,
    "look": look.look,
    "why": why.why,
    "show": show.show,
    "compare": compare.compare,
    "ablate": ablate.ablate,
    "evaluate": evaluate.evaluate,
    "calibrate": calibrate.calibrate,
    "compress": compress.compress,
    "circuit": circuit.circuit,
    "bench-circuits": bench_circuits.bench_circuits,
    "generate": generate.generate,
    "export": export.export,
    "serve-check": serve_check.serve_check,
    "check": check.check,
    "bench": bench.bench,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(explained(_command, _name in RESUMING))

_models = typer.Typer(rich_markup_mode="rich")
_models.callback(invoke_without_command=True)(explained(models.models))
_models.command("get")(explained(models.get))
_models.command("remove")(explained(models.remove))
app.add_typer(_models, name="models")


def main() -> None:
    """The `interp` command. Exit codes: 0 done, 1 declined, 2 an error that was explained, 3 done
    but for what memory was too small for, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # "≥" must not end a long scan where the terminal's encoding lacks it.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
