"""The recipe of the embedded model: which stages there are, in which order, and what each needs.

    run_session(Session(stage="all", workdir=Path(".training"), minutes=120))

All stages take about five hours on one CPU core that computes in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

from training.assemble import export, unpack
from training.features import train_ssl
from training.flow import train_transformer
from training.loop import read_progress
from training.parser import train_parser
from training.session import Session
from training.text import train_clip, train_t5
from training.vae import train_vae

STAGES: dict[str, Callable[[Session], bool]] = {
    "parser": train_parser,
    "vae": train_vae,
    "clip": train_clip,
    "t5": train_t5,
    "ssl": train_ssl,
    "transformer": train_transformer,
}
SHIPPED = ("parser", "vae", "clip", "t5", "transformer")
NEEDS = {"vae": ("parser",), "transformer": SHIPPED[:-1], "export": SHIPPED}


def run_session(session: Session) -> bool:
    """Do what a session asks for.

    Returns: whether it came to its end, and not only to the end of its time.

    Raises:
        UserError: a stage whose predecessors are not trained.
    """
    features = session.alignment.layers and session.alignment.target == "features"
    if session.stage == "all":
        names = [name for name in STAGES if name != "ssl" or features]
        return all(STAGES[name](session) for name in names)
    needed = NEEDS.get(session.stage, ())
    for name in (*needed, "ssl") if features and session.stage == "transformer" else needed:
        read_progress(session.workdir / name)
    if session.stage == "export":
        export(session)
    elif session.stage == "import":
        unpack(session)
    else:
        return STAGES[session.stage](session)
    return True
