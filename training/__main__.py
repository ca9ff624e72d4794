"""The one command that trains what the package embeds.

python -m training                                     # everything, into .training
python -m training transformer --minutes 60            # an hour of one stage; the same again goes on, exactly
python -m training import --workdir more               # go on from what ships ...
python -m training transformer --workdir more --steps 20000
python -m training export                              # replace what ships
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from typer.exceptions import Abort, TyperException

from mmdit_probe.errors import ProbeError, run_script
from training.session import Session


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code: 0, 1 for a failure, 2 for a bad request, 130 if interrupted.

    Args:
        argv: arguments; those of the process if None.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(Session)
    try:
        asked = app(
            args=sys.argv[1:] if argv is None else list(argv), prog_name="python -m training", standalone_mode=False
        )
        if isinstance(asked, Session):  # nothing was asked for by --help
            from mmdit_probe.quiet import quiet

            with quiet():  # it imports diffusers' pipelines, which import transformers' processors
                from training.recipe import run_session

            run_session(asked)
    except (ProbeError, TyperException) as error:
        message = (
            error.format_message().replace("Value error, ", "") if isinstance(error, TyperException) else str(error)
        )
        print(f"error: {message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, Abort):
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
