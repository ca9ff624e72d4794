"""`mmdit-probe discover`: what falls apart in a picture, without naming it (arXiv:2509.18096, section 3.5)."""

from __future__ import annotations

from typing import Annotated

import typer

from mmdit_probe.cli.options import READING, SESSION, Reading, Session, session_without
from mmdit_probe.cli.segment import MethodOption, Picture, Refine

MethodName = Annotated[str, typer.Option(help="seg4diff-unsup, diffseg or diffcut.")]
Names = Annotated[
    str | None,
    typer.Option(help="Candidate names by comma, or a .txt file: each segment takes the one that fits best."),
]
NamesBy = Annotated[
    str,
    typer.Option(help="Method whose maps of the candidates decide: seg4diff (the I2T words), proxyclip (a CLIP), ..."),
]
Tau = Annotated[float | None, typer.Option(help="Merging threshold of the method; scan it per model.")]


@session_without("resume")
def command(
    image: Picture,
    method: MethodName = "seg4diff-unsup",
    tau: Tau = None,
    names: Names = None,
    names_by: NamesBy = "seg4diff",
    set_: MethodOption = None,
    refine: Refine = "none",
    reading: Reading = READING,
    session: Session = SESSION,
) -> None:
    """Split a picture into segments without any class names, from the empty prompt. Files as `segment` writes them."""
    from mmdit_probe.cli.segment import load_read, prepare, report
    from mmdit_probe.cli.session import output_of
    from mmdit_probe.data import parse_classes
    from mmdit_probe.errors import UserError
    from mmdit_probe.segment.methods import find
    from mmdit_probe.segment.refine import Refinement

    output = output_of(session)
    find(method)
    if find(names_by).unsupervised:
        raise UserError(f"--names-by {names_by!r} reads no names; take seg4diff, proxyclip or another that does")
    candidates = None if names is None else parse_classes(names)
    Refinement.parse(refine)
    options = [*(set_ or []), *([f"tau={tau}"] if tau is not None else [])]
    request, picture, shared = prepare(image, method, options, refine, reading, session)

    from mmdit_probe.segment.run import discover, name_segments

    loaded = load_read(reading, session)
    found = discover(loaded, picture, **shared)
    if candidates is not None:
        request |= {"names": [list(one.synonyms) for one in candidates], "names_by": names_by}
        found = name_segments(loaded, found, candidates, method=names_by, weights=shared["reading"].weights)
    report("discover", found, loaded, session, request, output)
