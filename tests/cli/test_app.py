"""The command line itself: fast help without torch, one-line errors, completion, doctor and models."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from io import StringIO
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from rich.cells import cell_len
from rich.console import Console

from mmdit_probe import __version__
from mmdit_probe.cli import app as cli
from mmdit_probe.cli.models import describe
from mmdit_probe.cli.tables import show
from mmdit_probe.errors import RunError
from mmdit_probe.experiments.target import LAYERS
from mmdit_probe.experiments.text import TextTable, claim_table

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmdit_probe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in ("attention-budget", "segment", "evaluate", "train-magnet", "models", "scenes")),
        ["--version"],
    ],
)
def test_help_needs_no_heavy_import(arguments):
    heavy = "torch", "diffusers", "transformers", "pandas", "matplotlib", "scipy", "pyarrow"
    script = (
        "import sys\nfrom mmdit_probe.cli.app import main\n"
        f"try:\n    main({arguments!r})\nfinally:\n"
        f"    print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"


def test_help_takes_less_than_a_second():
    before = os.times()
    assert "attention-budget" in run("--help").stdout
    after = os.times()
    # Processor time, not the clock's: other work on the machine must not decide a test.
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    assert spent < 1.0


@pytest.mark.parametrize("columns", [60, 80])
def test_help_shows_names_whole(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 60 columns "--max-sequence-length" was "--max-sequence-...", and methods and defaults were cut, too."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, command in cli.every_command().items():
        _, out, _ = called(capsys, *name.split(), "--help")
        names = [one for option in command.params for one in option.opts if one.startswith("-")]
        assert [one for one in names if not re.search(rf"(?<![\w-]){one}(?![\w-])", out)] == [], name
        assert "\N{HORIZONTAL ELLIPSIS}" not in out
        lines = [line for line in out.splitlines() if not line.startswith("mmdit-probe ")]  # examples: to be copied
        assert max(map(len, lines)) <= columns, name
        assert all(str(one.rich_help_panel or "") in out for one in command.params if one.name != "help")


def test_every_command_on_a_model_takes_the_shared_options():
    import typer

    def named(command: object) -> set[str]:
        return {name for one in command.params for name in one.opts}  # type: ignore[attr-defined]

    commands = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    on_a_model = {name: named(one) for name, one in commands.items() if "--model" in named(one)}
    assert set(on_a_model) == {one.name for one in cli.COMMANDS}
    shared = [
        "-m", "--lora", "--no-t5", "--max-sequence-length", "--device", "--dtype", "--seed", "-o", "--resume", "-q",
        "--json", "--debug",
    ]  # fmt: skip
    missing = {name: [option for option in shared if option not in has] for name, has in on_a_model.items()}
    assert {name: options for name, options in missing.items() if options} == {
        "segment": ["--resume"], "discover": ["--resume"],
    }  # fmt: skip
    # Help is rich markup, in which "[default: ...]" is a style and vanishes: such defaults are given as `show_default`.
    assert [
        (name, one.name) for name, command in commands.items() for one in command.params
        if "[default" in (getattr(one, "help", None) or "")
    ] == []  # fmt: skip


def test_version(capsys):
    assert called(capsys, "--version") == (0, f"mmdit-probe {__version__}\n", "")


def test_no_arguments_show_the_commands(capsys):
    code, out, _ = called(capsys)
    assert code == 0
    for name in ("attention-budget", "doctor", "models", "scenes"):
        assert name in out


def test_completion_offers_commands_and_their_options():
    shell = {"_MMDIT_PROBE_COMPLETE": "complete_bash", "COMP_WORDS": "mmdit-probe atte", "COMP_CWORD": "1"}
    script = "from mmdit_probe.cli.app import app; app(prog_name='mmdit-probe')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | shell)
    assert done.stdout.split() == ["attention-budget"]


def completed(command: str, name: str, typed: str) -> list[str]:
    made = cli.every_command()[command]
    context = made.make_context(command, [], resilient_parsing=True)
    (one,) = [one for one in made.params if one.name == name]
    return [item.value for item in one.shell_complete(context, typed)]


def test_completion_offers_sets_sources_and_options_of_methods():
    """None of them was."""
    assert completed("segment", "options", "te") == ["teleport=", "temperature="]
    assert completed("evaluate", "options", "iseg.e") == ["iseg.ent="]
    assert completed("evaluate", "method", "seg4diff,is") == ["seg4diff,iseg"]
    assert completed("datasets check", "source", "sa") == ["sa1b:"]
    assert completed("segment", "image", "scenes:v") == ["scenes:val:0"]
    sets = {name for name, of in cli.every_command().items() for one in of.params if one.name == "prompts"}
    assert len(sets) > 5 and all(
        completed(name, "prompts", "scenes:t") == ["scenes:train", "scenes:test"] for name in sets
    )
    for name in ("images", "dataset"):
        sources = [command for command, of in cli.every_command().items() for one in of.params if one.name == name]
        assert len(sources) > 1 and all("scenes:val" in completed(one, name, "s") for one in sources)


def test_unknown_command_names_the_closest(capsys):
    code, _, err = called(capsys, "modles")
    assert code == 2
    assert err == "error: No such command 'modles'. Did you mean 'models'?\n"


@pytest.mark.parametrize("argument", ["caf\udce9 ring", "a\0b.png"])
def test_an_argument_that_is_no_text_is_refused_by_name(capsys, argument):
    """A shell in another encoding hands over bytes that are not UTF-8; nothing could write them down."""
    code, _, err = called(capsys, "maps", argument)
    assert code == 2 and err.startswith(f"error: {argument!r} is not UTF-8 text")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "error: ZeroDivisionError: division by zero; run again with --debug",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; finished items are kept"),
    ],
)
def test_failures_are_one_line(capsys, monkeypatch, error, code, message):
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    found, out, err = called(capsys, "attention-budget")
    assert (found, out) == (code, "")
    assert err.startswith(message)
    assert len(err.strip().splitlines()) == 1
    found, out, _ = called(capsys, "models", "--json")
    assert json.loads(out)["exit_code"] == code


@pytest.mark.parametrize("command", ["segment", "discover", "models", "doctor"])
def test_nothing_is_said_of_resuming_where_it_cannot_be(capsys, monkeypatch, command):
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert called(capsys, command) == (130, "", "error: interrupted\n")


NEEDED = {"maps": ["a ring", "--words", "ring"], "explore": ["a ring"], "discover": ["scenes:val:0"],
          "segment": ["scenes:val:0", "--classes", "ring"]}  # fmt: skip
LAYERED = [
    ([one.name, *NEEDED.get(one.name, [])], ["--" + name.replace("_", "-")])
    for one in cli.COMMANDS for name in LAYERS if name in one.__dataclass_fields__ and name != "lora_layers"
] + [(["train-magnet", "--layers", "4"], ["--lora-layers"])]  # fmt: skip
"""Every command that names layers, with each option that does."""
SELECTED = [["perturb"], ["generate"], ["evaluate"], ["train-magnet"]]
WRONG = [
    (["perturb", "--layers", "nine"], "cannot read 'nine' as a layer"),
    (["attention-budget", "--heads", "x"], "cannot read 'x' as a head"),
    (["value-norms", "--steps", "some"], "cannot read 'some' as a step"),
    (["attention-budget", "--prompts", "missing.txt"], "no prompts file 'missing.txt'"),
    (["attention-budget", "--prompts", "a cat", "--model", "scenes-sd33"], "did you mean 'scenes-sd3'"),
    (["generate", "--prompts", "a cat", "--device", "gpu"], "unknown device 'gpu'"),
    (["pca", "--dtype", "float8"], "unknown dtype 'float8'"),
    (["score", "--categories", "color"], "unknown category 'color'"),
    (["maps", "a", "red", "ring"], "(red ring); a text of several words goes into quotation marks"),
    (["maps", "a red ring", "--words", "cat"], "unknown word 'cat': Known: a, red, ring"),
    (["maps", "a red ring", "--model", "SD3"], "hub id OWNER/NAME) 'SD3'"),
    (["maps", "a red ring", "--limit", "ten"], "'--limit' / '-n': expected a whole number"),
    (["maps", "a red ring", "--guidance", "high"], "'--guidance': expected a number"),
    (["scenes", "show", "--limit", "100"], "'--limit' / '-n': expected at most 60"),
    (["maps", " "], "prompt ' ' has no word to look for"),
    (["maps", "red ring " * 2500], "at most 20000 are read"),
    (["select-layers", "--from", "gone"], "'gone' is no run folder of"),
    (["segment", "scenes:val:0", "--classes", "ring", "--size", "7x7"], "both sides must be multiples of 4"),
    (["explore", "!"], "prompt '!' has no word to look for"),
    (["maps", "a red ring", "--words", " , "], "--words ' , ' names no word"),
    (["maps", "a red ring", "--words", "ring, rings"], "unknown word 'rings': did you mean 'ring'"),
    (["maps", "a red ring", "--stream", "t6"], "unknown encoder stream 't6': did you mean 't5'"),
    (["perturb", "--streams", "clip,"], "unknown encoder stream ''"),
    (["train-magnet", "--layers", "4", "--streams", "t6"], "did you mean 't5'"),
    (["train-magnet", "--layers", "4", "--validation", "scenes"], "'scenes' are the pictures that are trained on"),
    (["maps", "a red ring", "--size", "63x64"], "both sides must be multiples of 4"),
    (["maps", "a ring", "--image", "scenes:val:0", "--num-steps", "4"], "--num-steps is of pictures that are drawn"),
    (["attention-budget", "--images", "scenes:val", "--guidance", "2"], "--guidance is of sampling"),
    (["maps", "a red ring", "--layers", "5-2"], "layer range '5-2' runs backwards"),
    (["maps", "a red ring", "--heads", "x"], "cannot read 'x' as a head"),
    (["explore", "a red ring", "--layers", "x"], "cannot read 'x' as a layer"),
    (["report", "--images", "nowhere"], "no folder 'nowhere'"),
    (["swap-test", "--steps", "nope"], "cannot read 'nope' as a step"),
    (["report", "--control", "uniforn"], "did you mean 'uniform'"),
    (["select-layers", "--rule", "rank"], "did you mean 'ranks'"),
    (["diagnose", "--images", "nowhere"], "no folder 'nowhere'"),
    (["attribute", "--limit", "0"], "--limit is 0"),
    (["segment", "none.png", "--classes", "cat"], "no picture 'none.png'"),
    (["segment", "scenes:val:0", "--classes", "cat", "--method", "seg4dif"], "did you mean 'seg4diff'"),
    (["segment", "scenes:val:0", "--classes", "cat", "--background", "treshold:1"], "unknown background rule"),
    (["segment", "scenes:val:0"], "Missing option '--classes'"),
    (["discover", "scenes:val:0", "--refine", "pammr"], "did you mean 'pamr'"),
    (["discover", "scenes:val:0", "--fit", "stretch"], "unknown --fit 'stretch'"),
    (["evaluate", "--dataset", "voc22:here"], "did you mean 'voc2"),
    (["evaluate", "--preset", "seg4dif"], "did you mean 'seg4diff'"),
    (["train-magnet", "--layers", "4", "--rank", "0"], "--rank is 0"),
    (["train-magnet", "--layers", "4", "--recipe", "our"], "did you mean 'ours'"),
    (["train-magnet", "--layers", "x"], "cannot read 'x' as a layer"),
    (["train-magnet", "--layers", "4", "--dataset", "voc20:gone"], "no folder 'gone'"),
    (["report", "--images", "gone"], "no folder 'gone'"),
    (["evaluate", "--size", "65x65"], "both sides must be multiples of 4"),
    (["evaluate", "--size", "4096x4096"], "this model has positions for 96 pixels a side"),
    (["maps", "a red ring", "--size", "4096x4096"], "this model has positions for 96 pixels a side"),
    (["segment", "scenes:val:0", "--classes", "ring, " + "red ring " * 200], "has 1799 characters; expected at most"),
    (["perturb", "--control", "none,random"], "--control none,random: none stands alone"),
    (["evaluate", "--limit", "20000000"], "--limit is 20000000; expected a whole number from 1 to 10000000"),
    (["evaluate", "--batch", "0"], "expected auto, or a whole number of at least 1"),
    (["value-norms", "--model", "."], "it has no model_index.json"),
    (["maps", "a red ring", "--offload", "groups"], "did you mean 'group'"),
    (["perturb", "--quantize", "int4"], "unknown quantization 'int4'"),
    (["value-norms", "--lora", "gone"], "no LoRA 'gone'"),
    *(([*line, *which, "99"], "layer 99 does not exist: there are 8 layers, 0 to 7") for line, which in LAYERED),
    *(([*line, "--selection", "gone.json"], "no selection 'gone.json'") for line in SELECTED),
    *((["train-magnet", "--layers", "4", "--report-to", name], "the package is not installed")
      for name in ("tensorboard", "wandb") if not find_spec(name) and not find_spec(f"{name}X")),
    (["pca", "--heads", "77"], "head 77 does not exist: there are 4 heads, 0 to 3"),
    (["scenes"], "no command is given; --help names"),
    (["datasets"], "no command is given; --help names"),
    (["models", "-q", "inspect", "scenes-sd3"], "--quiet stand after the command: models inspect"),
    (["maps", "- a red ring"], "a text that begins with - stands after --"),
    *(([*line, "x" * 300], "cannot be opened (File name too long)")
      for line in (["maps", "a ring", "--model"], ["maps", "a ring", "--lora"], ["perturb", "--selection"])),
]  # fmt: skip


def test_a_wrong_call_is_one_line_and_needs_no_torch(tmp_path):
    """All in one process, so that the modules of one call are there for the next: none may bring torch."""
    script = (
        "import json, sys\nfrom mmdit_probe.cli.app import main\n"
        "for line in json.load(sys.stdin):\n"
        "    try:\n        main(line)\n"
        "    except SystemExit as stop:\n        print(stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([line for line, _ in WRONG]), capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120,
    )  # fmt: skip
    assert done.stdout.split("\n")[:-1] == ["2 False"] * len(WRONG), done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(WRONG), done.stderr
    for (line, words), error in zip(WRONG, errors, strict=True):
        assert error.startswith("error: ") and words in error, (line, error)
        assert "--debug" not in error


def test_every_command_shows_examples_and_headings():
    import re

    found = cli.every_command()
    assert {one.name for one in cli.COMMANDS} | {"compare", "doctor", "models", "datasets check", "scenes show"} <= set(
        found
    )
    for name, command in found.items():
        lines = command.epilog.split("\n\n")[1:]
        assert lines and all(line.startswith(f"mmdit-probe {name}") for line in lines)
        flags = {flag for one in command.params for flag in one.opts}
        assert {word for line in lines for word in re.findall(r" (-[-a-z0-9]+)", line)} <= flags
        panels = {one.name: one.rich_help_panel for one in command.params if one.param_type_name == "option"}
        assert None not in [panel for option, panel in panels.items() if option != "help"], (name, panels)


def test_an_option_of_one_name_takes_one_kind_of_value():
    """A text stands for what is named, for several by comma, or for a number or a word."""
    kinds: dict[str, set[str]] = {}
    for command in cli.every_command().values():
        for one in command.params:
            for flag in one.opts:
                if flag.startswith("--"):
                    kinds.setdefault(flag, set()).add(one.type_descriptor.annotation.__name__)
    several = {flag for flag, found in kinds.items() if len(found) > 1}
    assert several == {
        "--sigma",  # segment and sigma-map take several levels
        "--lora",  # score takes several adapters
        "--batch",  # evaluate knows auto
        "--selection",  # a file, or a selection at hand
    }


def test_spellings_that_were_promised_stay():
    for command in ("maps", "explore"):
        given = {flag for one in cli.every_command()[command].params for flag in one.opts}
        assert {"--image", "--images", "--stream", "--streams", "--limit", "-n"} <= given


def test_what_matters_most_comes_first():
    shown = [one.opts[0] for one in cli.every_command()["attention-budget"].params if one.name != "help"]
    assert shown[:10] == [
        "--prompts", "--images", "--limit", "--references", "--model", "--device", "--dtype", "--lora", "--layers",
        "--heads",
    ]  # fmt: skip


def test_a_table_leaves_out_its_spare_columns_and_says_so():
    from rich.console import Console

    from mmdit_probe.cli.tables import fitted
    from mmdit_probe.experiments.text import TextTable

    names = [f"long-column-{k}" for k in range(8)]
    table = TextTable(["layer", *names], spare=names[:4:-1])
    table.add(*(["1"] * 9))
    console = Console(width=90)
    shown, remark = fitted(table, console)
    assert len(shown.columns) == 6 and remark.startswith("long-column-7, long-column-6")
    with console.capture() as captured:
        console.print(shown)
    assert "long-column-4" in captured.get() and max(map(len, captured.get().splitlines())) <= 90


def test_a_column_that_is_spare_for_two_reasons_is_left_out_once():
    from rich.console import Console

    from mmdit_probe.cli.tables import fitted
    from mmdit_probe.experiments.text import TextTable

    table = TextTable(["layer", "gain", "difference"], [["1" * 9] * 3], spare=("difference", "difference", "gain"))
    assert fitted(table, Console(width=12))[1] == "difference, gain"


def test_columns_that_are_asked_for_count_in_a_pipe_too(monkeypatch):
    from mmdit_probe.cli.output import PIPED_WIDTH, Output

    monkeypatch.delenv("COLUMNS", raising=False)
    assert Output(debug=True).out.width == PIPED_WIDTH
    monkeypatch.setenv("COLUMNS", "80")
    assert Output(debug=True).out.width == 80


def test_a_terminal_of_no_width_and_a_closed_pipe_have_tables_too(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert "scenes-sd3" in called(capsys, "models")[1]
    assert "scenes-sd3" in called(capsys, "models", "--help")[1]
    monkeypatch.setattr(sys, "stdout", None)
    assert called(capsys, "models")[::2] == (0, "")


def test_choices_are_folded_between_them(capsys, monkeypatch):
    """It was cut into "d" and "iffseg"."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = called(capsys, "evaluate", "--help")[1]
    assert max(map(len, shown.splitlines())) <= 80
    for name in ("diffseg", "diffsegmenter", "corrclip", "aspect", "dataset | row"):
        assert re.search(rf"[| ]{re.escape(name)}[| ]", shown), name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_takes_no_json_and_gives_no_traceback():
    with open("/dev/full", "w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "mmdit_probe", "models", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: OSError: ") and done.stderr.count("\n") == 1


def test_what_is_left_out_of_a_table_that_no_file_holds_is_in_the_document(capsys, monkeypatch):
    layer = {"index": 0, "path": "transformer_blocks.0.attn", "order": [("image", 256)], "kernel": "flash"}
    found = {"transformer": "T", "family": None, "layers": [layer], "other attention": [], "entry agrees": True}
    monkeypatch.setattr("mmdit_probe.observe.inspect.inspect_model", lambda path: found)
    monkeypatch.setenv("COLUMNS", "40")
    assert "kernel (see --json)" in " ".join(called(capsys, "models", "inspect", "m")[1].split())
    assert called(capsys, "models", "inspect", "m", "-q")[1] == ""


def test_cells_are_never_folded():
    """Headings are, then what is spare goes, then the columns furthest right but those that name the row."""
    from rich.console import Console

    from mmdit_probe.cli.tables import fitted
    from mmdit_probe.experiments.text import TextTable

    interval = "+0.000 [+0.000, +0.000]"

    def columns(width: int) -> tuple[list[str], str]:
        names = ["place", "share of the facts that the prompt states", "control", "objects right", "control", "verdict"]
        table = TextTable(names, left=("verdict",), spare=("control",))
        table.add("layer 3", *([interval, "+0.000"] * 2), "too few")
        shown, remark = fitted(table, console := Console(width=width))
        with console.capture() as captured:
            console.print(shown)
        lines = captured.get().splitlines()
        assert max(map(len, lines)) <= width
        assert sum("layer 3" in line and "too few" in line and interval in line for line in lines) == 1
        return [str(one.header) for one in shown.columns], remark

    whole, remark = columns(110)
    assert len(whole) == 6 and remark == ""
    folded = "share of the facts that\nthe prompt states"
    assert columns(86)[0] == ["place", folded, "control", "objects right", "control", "verdict"]
    assert columns(70) == (["place", folded, "objects right", "verdict"], "control")
    assert columns(50) == (["place", folded, "verdict"], "control, objects right")


def narrowed(table: TextTable, width: int) -> tuple[list[str], str, list[str]]:
    """Columns of the table on a console, what is said of the others, and its lines."""
    from rich.console import Console

    from mmdit_probe.cli.tables import fitted

    shown, remark = fitted(table, console := Console(width=width))
    with console.capture() as captured:
        console.print(shown)
    return [str(one.header) for one in shown.columns], remark, captured.get().splitlines()


def test_texts_are_folded_before_the_numbers_go():
    """`evaluate` on 60 columns showed refinements and n without any mIoU, the claims of `head-triage` on 80 no
    difference."""
    table = TextTable(["protocol", "method", "refine", "n", "mIoU"], left=("protocol", "method", "refine"))
    table.add("unsupervised", "one true token per class", "affinity+pamr", "20", ".103")
    columns, remark, lines = narrowed(table, 60)
    assert columns[-1] == "mIoU" and remark == "" and max(map(len, lines)) <= 60
    assert [line for line in lines if ".103" in line and "affinity+pamr" in line]

    numbers = {"value": 0.2, "control_value": 0.1, "difference": 0.1, "low": -0.2, "high": 0.3, "n": 3}
    names = [("triaged, scaled", "random heads"), ("triaged", "raw")]
    row = numbers | {"layer": 2, "verdict": "too few items"}
    claims = pd.DataFrame([row | {"kind": kind, "control": control} for kind, control in names])
    for width in (80, 60):
        columns, remark, lines = narrowed(claim_table(claims), width)
        assert "difference" in columns and remark == "control's, value, n"
        assert [line for line in lines if "+0.100 [-0.200, +0.300]" in line] and max(map(len, lines)) <= width


def test_a_heading_that_others_share_says_what_it_is_of_when_it_goes():
    table = TextTable(["layer", "remove", "verdict", "double", "verdict"])
    table.add("2", *["+0.000 [-1.000, +1.000]", "too few items"] * 2)
    assert narrowed(table, 75)[:2] == (["layer", "remove", "verdict", "double"], "verdict of double")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(40, 100))
def test_whatever_is_shown_keeps_to_the_width_and_loses_nothing(data, width):
    words = st.lists(st.text("abc-/.ü語", min_size=1, max_size=width // 5), max_size=30).map(" ".join)
    columns = [f"{place} {data.draw(words)}" for place in range(data.draw(st.integers(1, 4)))]
    table = TextTable(columns, left=data.draw(st.sets(st.sampled_from(columns))), title=data.draw(words))
    table.rows.extend(["first", *(data.draw(words) for _ in columns[1:])] for _ in range(3))
    for text, most in ((table.title, min(width, 80)), (table, width)):
        show(text, Console(width=width, file=(written := StringIO()), color_system=None))
        lines = [line.rstrip() for line in written.getvalue().splitlines()]
        assert max(map(cell_len, lines), default=0) <= most
        whole = Counter("".join([text] if isinstance(text, str) else [text.title, *columns, *chain(*text.rows)]))
        if "not shown" not in written.getvalue():
            assert Counter(written.getvalue()) >= whole - Counter(" " * whole.total())


def test_a_path_is_not_broken_and_titles_are_as_wide_as_text():
    console, path = Console(width=80, file=StringIO()), "runs/" + "long-name/" * 12
    show(f"written: {path}", console)
    assert path in console.file.getvalue()
    narrow = TextTable(["a"], title="clipscore[scenes-clip]: mean over prompts, differences paired")
    narrow.add("1")
    show(narrow, console)
    assert narrow.title in console.file.getvalue()


def test_text_and_tables_are_printed_in_one_place():
    """What keeps to the width: anything that prints beside it need not."""
    for file in (ROOT / "mmdit_probe").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [ast.unparse(node.func) for node in calls if ast.unparse(node.func).endswith(".print")]
        assert not printing or file.name in ("progress.py", "tables.py"), f"{file}: {printing}"


def test_values_of_options_are_completed():
    def offered(words: str) -> set[str]:
        parts = words.split(" ")
        shell = {"_MMDIT_PROBE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
        script = "from mmdit_probe.cli.app import app; app(prog_name='mmdit-probe')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | shell)
        return set(done.stdout.split())

    assert offered("mmdit-probe segment --method i") == {"iseg"}
    assert offered("mmdit-probe evaluate --method iseg,diffc") == {"iseg,diffcut"}
    assert offered("mmdit-probe discover --fit s") == {"squash"}
    assert offered("mmdit-probe value-norms --control random,u") == {"random,uniform"}
    assert offered("mmdit-probe maps --model s") == {"scenes-sd3", "scenes-sd3-random"}
    assert offered("mmdit-probe pca --dtype b") == {"bfloat16"}
    assert offered("mmdit-probe scenes show --kind 2") == {"2d-spatial"}


def test_debug_shows_the_traceback(monkeypatch):
    def fail(**_: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RunError, match="the disk is full"):
        cli.main(["models", "--debug"])


def test_models_lists_families(capsys):
    code, out, _ = called(capsys, "models", "--json")
    assert code == 0
    document = json.loads(out)
    assert {"name": "sd3", "transformer": "SD3Transformer2DModel", "order": ["image", "text"]} in document["families"]
    assert "SD3Transformer2DModel" in called(capsys, "models")[1]


def test_models_describes_pipelines_and_leaves_other_assets_out(tmp_path, tiny_directory):
    (tmp_path / "parser").mkdir()
    (tmp_path / "twin.json").write_text('{"base": "scenes-sd3", "seed": 3}')
    assert describe(tmp_path / "parser") == ""
    assert describe(tmp_path / "twin.json") == "scenes-sd3 with a random transformer (seed 3): the control"
    assert describe(tiny_directory) == "StableDiffusion3Pipeline, 3 layers, 2 heads"


def test_doctor_reports_the_kernel_that_runs(capsys):
    import torch

    code, out, _ = called(capsys, "doctor", "--device", "cpu", "--json")
    assert code == 0
    report = json.loads(out)
    assert torch.__version__.startswith(report["versions"]["torch"])  # without the build, which PyPI does not name
    kernels = {row["dtype"]: row for row in report["kernels"]}
    assert kernels["float32"] == {
        "dtype": "float32", "kernel": "flash", "logsumexp": True, "route": "the kernel's log-sum-exp",
    }  # fmt: skip
    assert "log-sum-exp" in called(capsys, "doctor", "--device", "cpu")[1]


def test_doctor_refuses_an_unknown_device(capsys):
    code, _, err = called(capsys, "doctor", "--device", "gpu")
    assert code == 2
    assert err.startswith("error: unknown device 'gpu'")


PER_KIND = ("score", "sigma-map")
"""Commands of whose captions or scenes `--limit` takes so many of each kind, as their help says."""


def test_the_number_of_items_in_help_is_how_many_are_taken():
    """`--limit` of every command, as shown, against what it takes of the scenes when nothing is said."""
    import typer

    commands = typer.main.get_command(cli.app).commands
    shown, taken = {}, {}
    for one in cli.COMMANDS:
        option = next((o for o in commands[one.name].params if "--limit" in o.opts), None)
        said = getattr(option, "show_default", None)
        text = str(said if isinstance(said, str) else getattr(option, "default", ""))
        number = text.partition(", or all")[0]
        if number.isdigit() and one.name not in PER_KIND and (inputs := one().gather(True)) is not None:
            shown[one.name] = int(number)
            items = inputs[0] if isinstance(inputs, tuple) else inputs
            taken[one.name] = len(items)
    assert len(shown) >= 9 and shown == taken
