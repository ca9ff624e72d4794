"""An options dataclass that runs as a command: stated once, with help, defaults, headings and completion.

    app.command(Perturb.name)(command_of(Perturb))

It is a dataclass of `options.Option` fields with `run(target, out, resume, progress)` that returns a result with
`path`, `texts()` and `document()`. Values are checked by the class, so that the command and the library refuse them in
the same words.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from mmdit_probe.cli.options import Session, completing
from mmdit_probe.cli.output import Output
from mmdit_probe.errors import check_known
from mmdit_probe.experiments.options import DETAIL, INPUT, MODEL, OUTPUT
from mmdit_probe.experiments.target import Named
from mmdit_probe.options import METHOD, Described, choices_of, described
from mmdit_probe.results import processes
from mmdit_probe.results.folder import AUTO
from mmdit_probe.specs import parse_size

_PANELS = {INPUT: 0, MODEL: 2, METHOD: 3, OUTPUT: 4, DETAIL: 5}
"""Order of the headings, what matters most first; those that a command has of its own come second."""
_FIRST = ("prompts", "images", "dataset", "classes", "method", "layers", "heads")
"""Options that stand at the top of their heading."""
_SHORT = {"limit": ("-n",)}
WHOLE = 22
"""Characters of choices that stand on one line of `--help` on 80 columns."""


def command_of(options: Any) -> Callable[..., None]:
    """The command that runs an options dataclass: its options, and those of every command on a model."""
    own = {field.name: field for field in described(options) if field.option.command}
    left_out = (*own, *getattr(options, "without", ()))
    session = {name: parameter for name, parameter in _session_parameters() if name not in left_out}
    recipes = getattr(options, "recipes", {})

    def command(context: typer.Context, **given: Any) -> None:
        asked = {name: given[name] for name in own if given[name] not in (None, [])}
        if recipes and (recipe := given["recipe"]) is not None:
            check_known("recipe", recipe, recipes)
            stated = {name: value for name, value in asked.items() if _stated(context, name)}
            asked = {**asked, **recipes[recipe], **stated}
        run(options(**asked), Session(**{name: given[name] for name in session}), session)

    parameters = [_parameter(field, options) for field in own.values()]
    parameters += [_recipe(recipes)] if recipes else []
    rank = {name: place for place, name in enumerate(_by_class(options))}
    parameters = sorted([*parameters, *session.values()], key=lambda one: _place(one, rank))
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    command.__doc__ = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(options) or "").split("\n\n"))
    marks: Any = command
    marks.__signature__ = inspect.Signature([context, *parameters], return_annotation=None)
    marks.__annotations__ = {p.name: p.annotation for p in [context, *parameters]}
    return command


def run(options: Any, session: Session, offered: Any) -> None:
    """Run an options dataclass and print its answer.

    Args:
        offered: names of the session's options that the command has.
    """
    output = Output(quiet=session.quiet, as_json=session.as_json, debug=session.debug)
    if processes.alone_under_launcher():
        output.progress.note(
            "accelerate started one process only (--cpu leaves the others to MPI): use accelerate launch --multi_gpu "
            "--num_processes N, or torchrun --nproc_per_node N; both take CPUs where there is no GPU"
        )
    how: dict[str, Any] = {"progress": output.progress} | ({"resume": session.resume} if "resume" in offered else {})
    result = options.run(named(session), session.out or AUTO, **how)
    if processes.rank() == 0:
        output.result(result.document(), [*result.texts(), f"written: {result.path}"], result.path)


def named(session: Session) -> Named:
    """The model of a session."""
    names = ("device", "dtype", "lora", "offload", "quantize")
    options = {name: getattr(session, name) for name in names} | {"t5": not session.no_t5}
    return Named(
        session.model,
        options,
        session.max_sequence_length,
        session.num_frames,
        parse_size(session.size, "--size"),
        alone=True,
    )


def _stated(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _session_parameters() -> Iterator[tuple[str, inspect.Parameter]]:
    hints = get_type_hints(Session, include_extras=True)
    for field in fields(Session):
        yield field.name, _keyword(field.name, hints[field.name], field.default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _by_class(options: Any) -> Iterator[str]:
    """Names of the fields, those of a class before those of its bases."""
    for one in options.__mro__:
        yield from (name for name in vars(one).get("__annotations__", {}))


def _place(parameter: inspect.Parameter, rank: Mapping[str, int]) -> tuple[int, ...]:
    """Order in `--help`: by heading, what is needed, what is most used, then from the class to its bases."""
    (said,) = parameter.annotation.__metadata__
    name, needed = parameter.name, parameter.default is inspect.Parameter.empty
    first = _FIRST.index(name) if name in _FIRST else len(_FIRST)
    return _PANELS.get(said.rich_help_panel or INPUT, 1), not needed, first, rank.get(name, len(rank))


def _recipe(recipes: Any) -> inspect.Parameter:
    said = typer.Option(
        help="A set of options; those that are given win.", rich_help_panel=INPUT, metavar="|".join(recipes),
        autocompletion=completing(tuple(recipes)),
    )  # fmt: skip
    return _keyword("recipe", Annotated[str | None, said], None)


def _parameter(field: Described, options: Any) -> inspect.Parameter:
    kind, option = option_type(field.type), field.option
    default = options.__dataclass_fields__[field.name].default
    needed = default is MISSING
    if get_origin(kind) is list:
        default = list(default or [])
    shown: Any = default not in (None, [], MISSING)
    if option.shown_default is not None:
        shown = option.shown_default.format(options)
    how: dict[str, Any] = {"help": option.help, "rich_help_panel": option.panel, "show_default": shown}
    choices = tuple(choices_of(field.type))
    if choices:
        whole = "|".join(choices)  # a long one is folded, between choices
        how["metavar"] = whole if len(whole) <= WHOLE else " | ".join(choices)
    if option.values or choices:
        how["autocompletion"] = completing(option.values or choices)
    if option.argument:
        said: Any = typer.Argument(metavar=field.name.upper(), **how | {"rich_help_panel": None})
    else:
        said = typer.Option(field.flag, *option.also, *_SHORT.get(field.name, ()), **how)
    return _keyword(field.name, Annotated[kind, said], inspect.Parameter.empty if needed else default)


def option_type(hint: Any) -> Any:
    """What a command line gives for a field: numbers, flags, paths and lists as they are, all else as text."""
    parts = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    optional = type(None) in parts
    parts = [part for part in parts if part is not type(None)]
    kind: Any = str
    if len(parts) == 1 and parts[0] in (bool, int, float, Path):
        kind = parts[0]
    elif len(parts) == 1 and get_origin(parts[0]) is Sequence:
        kind = list[str]
    return kind | None if optional and kind is not bool else kind
