"""The `mmdit-probe` command: what exists, and how errors come out.

    mmdit-probe attention-budget --layers all
    mmdit-probe --help

Importing this module imports neither torch nor any model code: each command imports what it needs when it runs, and
command groups of other rooms are imported when they are called. Errors are one line on stderr and an exit code, 2 for
a bad request and 1 for a failure; `--debug` gives the traceback.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException

from mmdit_probe import __version__
from mmdit_probe.cli import compare, doctor, models
from mmdit_probe.cli.adapter import command_of
from mmdit_probe.cli.narrow import App
from mmdit_probe.cli.options import epilog
from mmdit_probe.errors import ProbeError, is_text
from mmdit_probe.experiments import (
    AttentionBudget,
    Attribute,
    BlockOperations,
    ContributionBudget,
    Diagnose,
    Discover,
    Evaluate,
    Explore,
    FeaturePCA,
    Generate,
    HeadTriage,
    Perturb,
    Report,
    Score,
    Segment,
    SelectLayers,
    SigmaByLayer,
    SwapTest,
    TrainMagnet,
    ValueNorms,
    WordMaps,
)

QUESTIONS: dict[str, tuple[Any, ...]] = {
    "Where is each word looked for?": (WordMaps, Explore, Report),
    "Where does attention go, what does text write?": (AttentionBudget, ContributionBudget, Diagnose),
    "How strongly do tokens speak, what do features carry?": (ValueNorms, FeaturePCA),
    "Is it causal?": (Perturb, Generate, Attribute, SwapTest, BlockOperations, SigmaByLayer),
    "Which layer, which heads ground words?": (SelectLayers, HeadTriage),
    "Segment with it; how good is that?": (Segment, Discover, Evaluate),
    "Better maps": (TrainMagnet, Score),
}
"""Heading of the help -> its commands."""
OTHER = "Runs, models, data"
COMMANDS: tuple[Any, ...] = tuple(one for commands in QUESTIONS.values() for one in commands)
RESUMABLE = {one.name for one in COMMANDS if "resume" not in getattr(one, "without", ())}
INTERRUPTED = 130
CLOSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What the system says of a path that may not be looked at, or that nothing can be called."""
LAZY = {
    "scenes": ("mmdit_probe.cli.scenes", "The embedded world: look at scenes."),
    "datasets": ("mmdit_probe.cli.datasets", "Segmentation data sets: list, check, prepare."),
}
"""Command groups that are imported when called: name -> (module with a typer `app`, line for the help)."""


class LazyGroup(TyperGroup):
    """A command group that knows names and help lines of groups it has not imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in LAZY:
            return TyperCommand(cmd_name, help=LAZY[cmd_name][1], rich_help_panel=OTHER)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name in LAZY:
            group = importlib.import_module(LAZY[name][0]).app
            return name, typer.main.get_group(group), args[1:]
        return super().resolve_command(ctx, args)


app = App(
    name="mmdit-probe",
    cls=LazyGroup,
    help="Exact attention probing of multi-modal diffusion transformers. Blocks are named query -> key: "
    "I2T = image queries, text keys.",
    epilog='Start: mmdit-probe maps "a red ring on grass". Each command\'s --help has examples that run.',
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for question, commands in QUESTIONS.items():
    for command in commands:
        examples = [f"{command.name} {line}" for line in command.examples]
        app.command(command.name, epilog=epilog(*examples), rich_help_panel=question)(command_of(command))
app.command("compare", epilog=epilog(*compare.EXAMPLES), rich_help_panel=OTHER)(compare.command)
app.command("doctor", epilog=epilog(*doctor.EXAMPLES), rich_help_panel=OTHER)(doctor.command)
app.add_typer(models.app, name="models", rich_help_panel=OTHER)


PLAINLY = {
    r"(Got unexpected extra argument.*)": r"\1; a text of several words goes into quotation marks",
    r"(No such option: -(?!-).*)": r"\1; a text that begins with - stands after --",
    r"Missing command\.": "no command is given; --help names those that there are",
    r"Input should be a valid integer.*": "expected a whole number",
    r"Input should be a valid number.*": "expected a number",
    r"Input should be greater than or equal to": "expected at least",
    r"Input should be less than or equal to": "expected at most",
}
"""What the reader of the command line says -> in words for those who typed it."""


def every_command() -> dict[str, Any]:
    """What is typed after the program's name -> the command, those of groups and `models` itself included."""
    group: Any = typer.main.get_command(app)
    found = dict(group.commands)
    found |= {name: typer.main.get_group(importlib.import_module(module).app) for name, (module, _) in LAZY.items()}
    inner = {f"{name} {of}": one for name, each in found.items() for of, one in getattr(each, "commands", {}).items()}
    return {name: one for name, one in found.items() if name not in LAZY} | inner


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mmdit-probe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        argv: arguments without the program's name; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = "--debug" in arguments, "--json" in arguments
    if os.environ.get("COLUMNS") == "0":  # no width is known: nothing at all would be printed
        del os.environ["COLUMNS"]
    if isinstance(sys.stdout, TextIOWrapper):  # Windows writes a pipe in its code page, which lacks most prompts' signs
        sys.stdout.reconfigure(errors="backslashreplace")
    foreign = next((one for one in arguments if not is_text(one)), None)
    if foreign is not None:
        sys.exit(_fail(f"{foreign!r} is not UTF-8 text or holds NUL; write it in UTF-8, rename a file", 2, as_json))
    try:
        code = app(args=arguments, prog_name="mmdit-probe", standalone_mode=False)
    except (ProbeError, TyperException) as error:
        if debug:
            raise
        message = _plainly(error.format_message()) if isinstance(error, TyperException) else str(error)
        sys.exit(_fail(message, error.exit_code, as_json))
    except (KeyboardInterrupt, Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in CLOSED:
            sys.exit(_fail(f"{str(error.filename)!r} cannot be opened ({error.strerror})", 2, as_json))
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        sys.exit(_fail(f"{reason}; run again with --debug for the traceback", 1, as_json))
    if code == INTERRUPTED:  # typer turns the key into this code
        kept = "; finished items are kept, continue with --resume" if RESUMABLE & set(arguments[:1]) else ""
        _fail(f"interrupted{kept}", INTERRUPTED, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _plainly(message: str) -> str:
    for found, said in PLAINLY.items():
        message = re.sub(found, said, message)
    return message


def _fail(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        with suppress(OSError):  # where it is written there is no space left: the line above says so
            print(json.dumps({"error": line, "exit_code": code}), flush=True)
    return code
