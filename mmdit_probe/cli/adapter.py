"""An experiment's options as a command: stated once, in its dataclass, with help, defaults and headings.

    app.command("perturb")(command_of(Perturb))

Values are checked by the experiment, so that the command and the library refuse them in the same words.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from mmdit_probe.cli.options import SESSION, Session
from mmdit_probe.cli.output import Output
from mmdit_probe.experiments.experiment import AUTO, Experiment
from mmdit_probe.experiments.target import Named
from mmdit_probe.options import Described, described


def command_of(experiment: type[Experiment]) -> Callable[..., None]:
    """The command that runs an experiment: its options, and those of every command on a model."""
    own = {field.name: field for field in described(experiment)}
    session = {name: parameter for name, parameter in _session_parameters() if name not in own}

    def command(**given: Any) -> None:
        options = {name: given[name] for name in own if given[name] is not None}
        of_session = Session(**{name: given[name] for name in session})
        run(experiment(**options), of_session)

    parameters = [_parameter(field, _default(experiment, field.name)) for field in own.values()]
    command.__doc__ = inspect.getdoc(experiment)
    marks: Any = command
    marks.__signature__ = inspect.Signature([*parameters, *session.values()], return_annotation=None)
    marks.__annotations__ = {p.name: p.annotation for p in [*parameters, *session.values()]}
    return command


def run(experiment: Experiment, session: Session) -> None:
    """Run an experiment and print its answer."""
    from mmdit_probe.results import processes

    output = Output(quiet=session.quiet, as_json=session.as_json, debug=session.debug)
    result = experiment.run(named(session), session.out or AUTO, session.resume, output.progress)
    if processes.rank() == 0:
        output.result(result.document(), [*result.texts(), f"tables and figures: {result.path}"], result.path)


def named(session: Session) -> Named:
    """The model of a session."""
    return Named(session.model, session.loading, session.max_sequence_length)


def _session_parameters() -> Iterator[tuple[str, inspect.Parameter]]:
    from typing import get_type_hints

    hints = get_type_hints(Session, include_extras=True)
    for field in fields(Session):
        yield (
            field.name,
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(SESSION, field.name),
                annotation=hints[field.name],
            ),
        )


def _default(experiment: type[Experiment], name: str) -> Any:
    field = experiment.__dataclass_fields__[name]
    return field.default if field.default is not MISSING else None


def _parameter(field: Described, default: Any) -> inspect.Parameter:
    kind, option = option_type(field.type), field.option
    if get_origin(kind) is list:
        default = list(default or [])
    shown = option.shown_default if option.shown_default is not None else default not in (None, [])
    said = typer.Option(
        *([field.flag, *_SHORT.get(field.name, ())] if kind is bool or option.flag or field.name in _SHORT else []),
        help=option.help, rich_help_panel=option.panel, show_default=shown,
    )  # fmt: skip
    annotation: Any = Annotated[kind, said]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_SHORT = {"n": ("-n",)}


def option_type(hint: Any) -> Any:
    """What a command line gives for a field: numbers, flags, choices and lists as they are, all else as text."""
    parts = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    optional = type(None) in parts
    parts = [part for part in parts if part is not type(None)]
    kind: Any = str
    if len(parts) == 1 and (parts[0] in (bool, int, float, Path) or get_origin(parts[0]) is Literal):
        kind = parts[0]
    elif len(parts) == 1 and get_origin(parts[0]) is not None and issubclass(get_origin(parts[0]), Sequence):
        kind = list[str]
    return kind | None if optional and kind is not bool else kind
