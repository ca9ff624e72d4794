"""Would the tests notice? Seeded random mutants of five rooms, each run against the tests that reach its line.

    python -m pip install coverage
    python benchmarks/mutants.py map                # which tests run which lines: once, 20 minutes of one core
    python benchmarks/mutants.py run                # 60 mutants a room, the nearest tests of each; again: goes on
    python benchmarks/mutants.py run --again        # survivors, against every test of their line
    python benchmarks/mutants.py run 12 40 --tests tests/data/test_coco.py      # these two, against these tests
    python benchmarks/mutants.py check              # do the tests that killed one pass without any?
    python benchmarks/mutants.py report             # results/mutants.md from results/mutants.json

A mutant is one changed node of the syntax tree: a comparison, an operator, `and` for `or`, a condition turned round, a
number plus one, a truth value, a keyword argument left out, a returned value left out, a statement left out, `min` for
`max`. Annotations, docstrings, texts of messages and what is only for type checkers are no candidates. All candidates
of a room are equally likely.

The sample and the map are of the package as it was committed when they were drawn. A mutant is run where its lines
stand in the package as committed now, against the tests as committed now: tests that were written for survivors count,
the sample stays. One whose lines stand no longer, killed or not, is "gone" and counted apart. Everything happens in a
copied tree under --work. One process imports torch and diffusers and forks per mutant, so that a mutant costs seconds.
Killed: a test fails, or the tests exceed five times their time. Tests that failed without a mutant are left out, so are
those that need a GPU; `check` runs those that killed one once more without any.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fcntl
import gc
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmdit_probe.errors import UserError, at_least, run_script

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PACKAGE = "mmdit_probe"
ROOMS = ("attention", "observe", "data", "results", "evaluate")
SEED = 13
A_ROOM = 60
ENOUGH_SECONDS = 5.0
"""Tests per mutant end after these seconds of their own time in the first pass; survivors meet all of them."""

NO_TESTS = 5
"""pytest's exit code where it was left without a test."""

SHARED = {
    *("PIL", "accelerate", "captum", "coverage", "diffusers", "hypothesis", "matplotlib", "numpy", "pandas", "peft"),
    *("pyarrow", "pytest", "rich", "safetensors", "scipy", "seaborn", "sklearn", "tokenizers", "torch"),
    *("transformers", "typer"),
}
"""Packages that are imported once for all mutants."""

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
OPPOSITE = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Mutant:
    """One changed place: `before` at bytes start to end of a file becomes `after`."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int

    @property
    def room(self) -> str:
        return self.file.split("/")[1]

    def apply(self, source: bytes) -> bytes:
        assert source[self.start : self.end].decode() == self.before
        return source[: self.start] + self.after.encode() + source[self.end :]

    def carried(self, drawn: bytes, now: bytes) -> Mutant | None:
        """The same change in a later text of its file; None where its lines no longer stand."""
        old, new = drawn.splitlines(keepends=True), now.splitlines(keepends=True)
        first, last = self.line - 1, drawn[: self.end].count(b"\n")
        for a, b, size in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
            if a <= first and last < a + size:
                moved = sum(map(len, new[: first + b - a])) - sum(map(len, old[:first]))
                return replace(self, line=self.line + b - a, start=self.start + moved, end=self.end + moved)
        return None


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(kind, node to replace, its replacement) of one node of the tree."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [SWAPPED[type(op)]() if i == j else other for j, other in enumerate(node.ops)]
            yield "comparison", node, ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield "operator", node, ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield "and/or", node, ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", node, node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth value", node, ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "number", node, ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            rest = node.keywords[:i] + node.keywords[i + 1 :]
            if keyword.arg is not None:
                yield "keyword left out", node, ast.Call(node.func, node.args, rest)
    elif isinstance(node, ast.Name) and node.id in OPPOSITE and isinstance(node.ctx, ast.Load):
        yield "opposite", node, ast.Name(OPPOSITE[node.id])
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "nothing returned", node, ast.Return(None)
    elif isinstance(node, ast.Raise | ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement left out", node, ast.Pass()
    elif isinstance(node, ast.Break | ast.Continue):
        yield "loop", node, ast.Continue() if isinstance(node, ast.Break) else ast.Break()
    conditions = [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp) else getattr(node, "ifs", [])
    for condition in conditions:
        yield "condition turned", condition, ast.UnaryOp(ast.Not(), condition)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def nodes(node: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """The nodes that may be changed, in order."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            types_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            union = isinstance(child, ast.BinOp) and isinstance(child.op, ast.BitOr) and not inside  # a type alias
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or types_only or union:
                continue
            yield child
            yield from nodes(child, inside or isinstance(child, ast.FunctionDef))


def candidates(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file; some say the same as before or do not compile."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in nodes(ast.parse(source)):
        for kind, old, new in changes(node):
            start = starts[old.lineno - 1] + old.col_offset  # type: ignore[attr-defined]
            end = starts[old.end_lineno - 1] + old.end_col_offset  # type: ignore[attr-defined, operator]
            after = ast.unparse(ast.fix_missing_locations(new))
            after = f"({after})" if isinstance(new, ast.expr) and not isinstance(new, ast.Constant) else after
            found.append(Mutant(file, old.lineno, kind, source[start:end].decode(), after, start, end))  # type: ignore[attr-defined]
    return found


def differs(mutant: Mutant, source: bytes) -> bool:
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def drawn(tree: Path) -> list[Mutant]:
    """The sample: equally many of each room, those of the rooms alternating, so that a run cut short is a sample."""
    rooms = []
    for room in ROOMS:
        sources = {p.relative_to(tree).as_posix(): p.read_bytes() for p in (tree / "mmdit_probe" / room).glob("*.py")}
        every = [mutant for file in sorted(sources) for mutant in candidates(file, sources[file])]
        print(f"{room}: {A_ROOM} of {len(every)} candidates")
        random.Random(f"{SEED} {room}").shuffle(every)
        rooms.append(list(itertools.islice((m for m in every if differs(m, sources[m.file])), A_ROOM)))
    return [mutant for together in zip(*rooms, strict=True) for mutant in together]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def git_bytes(commit: str, file: str) -> bytes:
    return subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True, check=True).stdout


def plant(place: Path, commit: str) -> Path:
    """A copied tree of one commit. No stamp: a mutant was left in it."""
    tree = place / "tree"
    if not (place / "stamp").exists() or (place / "stamp").read_text() != commit:
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(tree)], stdin=archive.stdout, check=True)
        (place / "stamp").write_text(commit)
    return tree


def forked(place: Path, action: Callable[[], int], seconds: float) -> int:
    """The exit code of an action in a forked process; 124 where it took more processor time, or 20 times as long."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(place / "tree")
        log = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        code = 3
        try:
            code = action()
        finally:
            os._exit(code)
    end = time.monotonic() + 20 * seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done or time.monotonic() > end:
            break
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # also what the tests started
    if not done:
        os.waitpid(pid, 0)
        return 124
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 124


def pytest_run(tree: Path, arguments: list[str], *plugins: object) -> int:
    """pytest in the tree, in this process, with the package as it stands there."""
    import pytest

    for name in [one for one in sys.modules if one.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    place = Path(str(importlib.import_module(PACKAGE).__file__))
    if not place.is_relative_to(tree):
        raise UserError(f"{PACKAGE} is imported from {str(place.parent)!r}, not from the copied tree")
    os.environ["PYTHONPATH"] = str(tree)
    words = ["-q", "-p", "no:cacheprovider", "-m", "not gpu and not browser", "--tb=line"]
    return int(pytest.main([*words, f"--basetemp={tree.parent / 'tmp'}", *arguments], plugins=list(plugins)))


class Watch:
    """Pytest plugin: which lines of the rooms each test runs, how long it takes, and whether it passes."""

    def __init__(self, tree: Path, out: Path) -> None:
        import coverage

        self.tree, self.out, self.tests = tree, out, {}
        rooms = [f"{tree}/mmdit_probe/{room}/*" for room in ROOMS]
        self.coverage = coverage.Coverage(data_file=None, include=rooms, config_file=False)
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.began = time.process_time()
        self.tests[nodeid] = {"passed": True, "seconds": 0.0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        test["passed"] &= report.passed
        test["seconds"] = round(time.process_time() - self.began, 3)

    def pytest_sessionfinish(self) -> None:
        self.coverage.switch_context("")
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            Path(file).relative_to(self.tree).as_posix(): {
                line: [test for test in tests if test] for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        modules = sorted(module for module in sys.modules if module.split(".")[0] in SHARED)
        self.out.write_text(json.dumps({"tests": self.tests, "lines": lines, "modules": modules}))


class Chosen:
    """Pytest plugin: only these tests (or files of them), in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.rank = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        ranks = [(min(self.rank.get(name, 1e9) for name in names(item.nodeid)), item) for item in items]
        items[:] = [item for rank, item in sorted(ranks, key=lambda r: r[0]) if rank < 1e9]


def names(test: str) -> tuple[str, str, str]:
    """A test by its whole name, without its parameters, and by its file."""
    return test, test.split("[")[0], test.split("::")[0]


class Map:
    """What `map` found: tests that run a line of the rooms."""

    def __init__(self, work: Path) -> None:
        parts = [json.loads(path.read_text()) for path in sorted((work / "map").glob("*.json"))]
        self.tests = {test: about for found in parts for test, about in found["tests"].items() if about["passed"]}
        self.lines: dict[str, dict[int, set[str]]] = {}
        for found in parts:
            for file, lines in found["lines"].items():
                for line, tests in lines.items():
                    self.lines.setdefault(file, {}).setdefault(int(line), set()).update(tests)

    def related(self, mutant: Mutant, most: float) -> list[str]:
        """Tests that run the mutant's line, the quickest first, up to `most` seconds of them.

        What runs at import (a constant, a default) belongs to every test that runs something of the file.
        """
        lines = self.lines.get(mutant.file, {})
        tests = (lines.get(mutant.line) or set().union(*lines.values(), set())) & set(self.tests)
        chosen: list[str] = []
        total = 0.0
        for test in sorted(tests, key=lambda t: (f"/{mutant.room}/" not in t, self.tests[t]["seconds"], t)):
            total += self.tests[test]["seconds"]
            if chosen and total > most:
                break
            chosen.append(test)
        return chosen

    def seconds(self, tests: list[str]) -> float:
        return sum(self.tests[test]["seconds"] for test in tests)


def test_files(tree: Path) -> list[str]:
    """Test files, those of the rooms first."""
    files = [path.relative_to(tree).as_posix() for path in (tree / "tests").rglob("test_*.py")]
    return sorted(files, key=lambda file: (file.split("/")[1] not in ROOMS, file))


def imports(work: Path) -> None:
    """What tests import and no mutant changes: done once, before forking."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    names = {name for path in (work / "map").glob("*.json") for name in json.loads(path.read_text())["modules"]}
    for name in sorted(names | SHARED):
        with suppress(Exception):  # parts of packages that need others
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork looks at what is new


def map_tests(work: Path, tree: Path, only: str) -> None:
    (work / "map").mkdir(exist_ok=True)
    for file in test_files(tree):
        out = work / "map" / f"{file.replace('/', '.')}.json"
        if only in file and not out.exists():
            began = time.monotonic()
            code = forked(tree.parent, lambda file=file, out=out: pytest_run(tree, [file], Watch(tree, out)), 900)  # type: ignore[misc]
            print(f"{file}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)


def run(work: Path, tree: Path, numbers: list[int], again: bool, named: list[str]) -> None:
    """Run what has not been killed yet of these mutants; the result of each is stored at once."""
    known, package = Map(work), json.loads(RESULTS.read_text())["package"]
    for number in numbers:
        row = kept(number)
        drawn = Mutant(**row["mutant"])
        mutant = drawn.carried(git_bytes(package, drawn.file), (tree / drawn.file).read_bytes())
        if mutant is None:
            kept(number, {"mutant": row["mutant"], "state": "gone"})
        if mutant is None or row["state"] == "killed" or (row["state"] == "survived" and not (again or named)):
            continue
        tests = named or known.related(drawn, 1e9 if again else ENOUGH_SECONDS)
        began = time.monotonic()
        code = outcome(tree, mutant, tests, 60 if named else 5 * known.seconds(tests) + 10) if tests else 0
        row.update(state="survived" if code in (0, NO_TESTS) else "killed", tests=len(tests), exit=code)
        log = (tree.parent / "log.txt").read_text(errors="replace").splitlines() if tests else []
        row["by"] = next((line for line in log if line.startswith(("FAILED", "ERROR"))), "")[:200]
        kept(number, row)
        told = f"{mutant.file}:{mutant.line} {mutant.before!r} -> {mutant.after!r}"
        print(
            f"{number} {row['state']} ({code}, {len(tests)} tests, {time.monotonic() - began:.0f} s) {told}", flush=True
        )


def check(tree: Path, rows: list[dict[str, Any]]) -> int:
    """Run the tests that killed a mutant, without any: those that fail, or are there no more, have shown nothing."""
    killers = {row["by"].split()[1].split("[")[0] for row in rows if row["state"] == "killed" and row["by"]}
    files = sorted({file for test in killers if (tree / (file := test.split("::")[0])).exists()})
    print(f"{len(killers)} tests killed a mutant, in {len(files)} files that are there", flush=True)
    code = forked(tree.parent, lambda: pytest_run(tree, files, Chosen(sorted(killers))), 1800)
    print((tree.parent / "log.txt").read_text(errors="replace"))
    return code


def kept(number: int, row: dict[str, Any] | None = None) -> dict[str, Any]:
    """A stored mutant; with `row` it is replaced, beside those of other workers."""
    with RESULTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stored = json.load(file)
        if row is not None:
            stored["mutants"][number] = row
            file.seek(0)
            file.truncate()
            file.write(json.dumps(stored, indent=1) + "\n")
        found: dict[str, Any] = stored["mutants"][number]
        return found


def outcome(tree: Path, mutant: Mutant, tests: list[str], seconds: float) -> int:
    """The exit code of the tests with the mutant in the tree, without bytecode of what it was."""
    path, stamp = tree / mutant.file, tree.parent / "stamp"
    said = stamp.read_text()
    source, dates = path.read_bytes(), path.stat()
    for cached in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        cached.unlink()

    def action() -> int:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        files = sorted({test.split("::")[0] for test in tests})
        return pytest_run(tree, ["-x", *(file for file in files if (tree / file).exists())], Chosen(tests))

    stamp.unlink()
    try:
        path.write_bytes(mutant.apply(source))
        return forked(tree.parent, action, seconds)
    finally:
        path.write_bytes(source)
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        stamp.write_text(said)


def report(stored: dict[str, Any]) -> str:
    """The result in markdown: shares with Wilson's intervals, and every survivor with what is said of it ("note")."""
    from mmdit_probe.results.statistics import interval

    rows = [row for row in stored["mutants"] if row["state"] in ("killed", "survived")]
    lines = [
        "| room | drawn | gone | run | killed | share [95 %] | equal | without those [95 %] |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for room in (*ROOMS, "all"):
        every, own = (
            [r for r in of if room in ("all", Mutant(**r["mutant"]).room)] for of in (stored["mutants"], rows)
        )
        told = [r for r in own if not r.get("note", "").startswith("equal")]
        gone, killed = (sum(r["state"] == state for r in every) for state in ("gone", "killed"))
        shares = []
        for of in (own, told):
            found = interval([float(row["state"] == "killed") for row in of], "share")
            shares.append(f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]")
        cells = (room, len(every), gone, len(own), killed, shares[0], len(own) - len(told), shares[1])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Survivors:", ""]
    for row in (row for row in rows if row["state"] == "survived"):
        mutant = Mutant(**row["mutant"])
        before, after = (" ".join(text.split()).replace("`", "'") for text in (mutant.before, mutant.after))
        note = row.get("note", "not explained")
        lines.append(f"- {mutant.file.removeprefix('mmdit_probe/')}:{mutant.line}, `{before}` -> `{after}`: {note}")
    head = f"Package of {stored['package'][:12]}, seed {stored['seed']}; by `python benchmarks/mutants.py`."
    return "\n".join(["# Mutants", "", head, "", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("map", "run", "check", "report"))
    parser.add_argument("numbers", type=at_least(0), nargs="*", help="run: these mutants only")
    parser.add_argument("--workdir", type=Path, default=ROOT / ".mutants", help="folder of the copied tree and the map")
    parser.add_argument("--only", default="", help="map: test files whose path holds this")
    parser.add_argument("--again", action="store_true", help="run: survivors too, against every test of their line")
    parser.add_argument("--tests", nargs="+", default=[], help="run: against these tests, instead of the map's")
    parser.add_argument("--share", default="0/1", help="run: which mutants, where several workers run: 0/2 and 1/2")
    options = parser.parse_args()
    if options.what == "report":
        RESULTS.with_suffix(".md").write_text(report(json.loads(RESULTS.read_text())))
        return
    share = re.fullmatch(r"(\d+)/([1-9]\d*)", options.share)
    if share is None or int(share[1]) >= int(share[2]):
        raise UserError(f"--share {options.share!r}; expected a worker of several, such as 0/2")
    first, workers = int(share[1]), int(share[2])
    place = options.workdir / f"worker-{first}"
    place.mkdir(parents=True, exist_ok=True)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"package": git("rev-parse", "HEAD")}
    tree = plant(
        place, stored["package"] if options.what == "map" or "mutants" not in stored else git("rev-parse", "HEAD")
    )
    if "mutants" not in stored:
        stored |= {"seed": SEED, "mutants": [{"mutant": asdict(one), "state": "drawn"} for one in drawn(tree)]}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    imports(options.workdir)
    if options.what == "map":
        map_tests(options.workdir, tree, options.only)
    elif options.what == "check":
        sys.exit(check(tree, stored["mutants"]))
    else:
        numbers = options.numbers or list(range(first, len(stored["mutants"]), workers))
        run(options.workdir, tree, numbers, options.again, options.tests)


if __name__ == "__main__":
    run_script(main)
