"""What an experiment returns: its tables, what they sum up to, what is claimed, the figures, and how to keep them.

result = ValueNorms(limit=8).run("scenes-sd3")
result.summary
result.save("runs/mine")          # the files that the command writes
Result.read("runs/mine").figure()
"""

from __future__ import annotations

import shutil
import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_probe import lazy_pandas as pd
from mmdit_probe.errors import ProbeWarning, UserError, check_known
from mmdit_probe.experiments import OF_COMMAND, experiment_of
from mmdit_probe.experiments.controls import CONTROLS
from mmdit_probe.experiments.store import FolderStore, Store
from mmdit_probe.experiments.text import Text, claim_lines, claim_table, page, records
from mmdit_probe.results import RunFolder, TableWriter, atomic
from mmdit_probe.results.folder import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmdit_probe.experiments.experiment import Experiment

EXPLAINED = CONTROLS | {
    "budget": "a coherent change of equal size", "noise": "white noise of equal size", "stock": "unedited images",
    "function": "two function words exchanged", "raw": "the same maps as they are",
    "random heads": "as many heads left out at random",
}  # fmt: skip


class Answer(ABC):
    """What every run returns, whatever was asked."""

    @property
    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The main table: tidy, one observation per row."""

    @property
    @abstractmethod
    def summary(self) -> pd.DataFrame:
        """What it sums up to."""

    @property
    def claims(self) -> pd.DataFrame:
        """What is held against a control: nothing, unless the run has controls."""
        return pd.DataFrame()

    @property
    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """All figures by name, the main one first."""

    @abstractmethod
    def texts(self) -> list[Text]:
        """What the command prints: tables and lines."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """What the command prints with `--json`."""

    @abstractmethod
    def save(self, folder: Path | str) -> Path:
        """Write what the command writes into a folder, new or empty."""

    def figure(self, name: str | None = None) -> Figure:
        """One figure; the main one if no name is given.

        Raises:
            UserError: there is none of this name.
        """
        if name is not None:
            check_known("figure", name, self.figures)
        return self.figures[next(iter(self.figures)) if name is None else name]

    def _repr_html_(self) -> str:
        """Figure and summary, for a notebook."""
        return page(repr(self), self.figure(), self.texts())


class Result(Answer):
    """The outcome of `Experiment.run`.

    Attributes:
        experiment: the options. data: the record (command, request, model, scheduler, ...), as in `run.json`.
        path: the run folder, or None.
    """

    def __init__(self, experiment: Experiment, store: Store) -> None:
        self.experiment, self.store = experiment, store
        self._held: dict[str, pd.DataFrame] = {}

    @classmethod
    def read(cls, folder: Path | str) -> Result:
        """The result that a run folder holds; of a run that is not finished, with a warning, that of the items that are
        done.

        Raises:
            UserError: no run folder, or not one of an experiment.
        """
        record = read_record(folder)
        if record is not None and record["command"] not in OF_COMMAND:  # one picture, a training, a comparison
            raise UserError(
                f"{str(folder)!r} holds a run of {record['command']}, which is not read back as a table; its files are"
                " what was found"
            )
        if record is None or "options" not in record or "model" not in record:
            raise UserError(f"{str(folder)!r} is no run folder of an experiment")
        if record["status"] != "finished":
            told = f"the run in {str(folder)!r} is not finished ({record['status']}): it holds the items that are done"
            warnings.warn(told, ProbeWarning, stacklevel=2)
        found = RunFolder(Path(folder), record)
        experiment = experiment_of(record["command"], record["options"])
        return cls(experiment, FolderStore(found, experiment.columns))

    @property
    def data(self) -> dict[str, Any]:
        return self.store.data

    @property
    def request(self) -> dict[str, Any]:
        """Every option and input that decided the numbers."""
        return dict(self.data["request"])

    @property
    def path(self) -> Path | None:
        return self.store.folder.path if isinstance(self.store, FolderStore) else None

    @property
    def model_name(self) -> str:
        """The model's name without the folders above it; of an adapter ("model+runs/mine/lora") its run's name too."""
        whole = str(self.data["model"]["id"])
        paths = [Path(whole)] if Path(whole).exists() else [Path(part) for part in whole.split("+")]
        return "+".join(path.parent.name if path.name == "lora" and path.parent.name else path.name for path in paths)

    @property
    def table(self) -> pd.DataFrame:
        return self.held(self.experiment.tables[0])

    def held(self, name: str) -> pd.DataFrame:
        """A table, read once: of ten thousand items it is as many files."""
        if name not in self._held:
            self._held[name] = self.store.table(name)
        return self._held[name]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """What it sums up to, with n and intervals."""
        return self.experiment.summarise(self)

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The measurement against each of its controls, paired; empty without controls."""
        return self.experiment.compare(self)

    @cached_property
    def frames(self) -> dict[str, pd.DataFrame]:
        """What is written beside the tables, by file name without suffix."""
        return self.experiment.frames(self)

    @cached_property
    def figures(self) -> dict[str, Figure]:
        return self.experiment.draw(self)

    def texts(self) -> list[Text]:
        texts = self.experiment.tell(self)
        told = self.experiment.headline(self.claims) if len(self.claims) else self.claims
        if len(told):
            texts += [claim_table(told), *claim_lines(told, self.experiment.claim(self), EXPLAINED)]
        return texts

    def document(self) -> dict[str, Any]:
        main = {"run": self.path, "model": self.data["model"]}
        if self.path is not None:
            main |= {"table": self.path / f"{self.experiment.tables[0]}.parquet", "figures": self._figure_files()}
        return main | {name: records(value) for name, value in self.experiment.document(self).items()}

    def save(self, folder: Path | str) -> Path:
        """Write what the command writes: tables, record, figures.

        Args:
            folder: new or empty.
        """
        target = RunFolder.open(self.experiment.name, self.request, out=folder)
        with target:
            target.record(**{name: value for name, value in self.data.items() if name not in OF_A_FOLDER})
            copy = FolderStore(target)
            files = []
            for name in self.store.picture_names():
                files += copy.keep_picture(name, self.store.load_picture(name))
            for name in self.store.array_names():
                files += copy.keep_arrays(name, self.store.load_arrays(name))
            if (parts := self.store.workplace("")) is not None and parts.is_dir():  # of a report, runs of their own
                files += shutil.copytree(parts, copy.place / parts.name).iterdir()
            kept = [name for name in self.experiment.tables if self.store.has(name)]
            for name in kept[::-1]:  # the first last: it says what belongs to it
                with TableWriter(copy.place, name) as writer, writer.item(0) as item:
                    item.write(self.store.table(name))
                    item.needs = [file.relative_to(copy.place).as_posix() for file in files]
                files.append(writer.file(0))
            target.record(tables=dict.fromkeys(kept, 1))
            self.write(target)
        return target.path

    def write(self, folder: RunFolder) -> None:
        """Write summaries, claims and figures into an open run folder."""
        from mmdit_probe.plots import save

        stem = self.experiment.name.replace("-", "_")
        for name, frame in self.frames.items():
            atomic.write_text(folder.path / f"{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
        if len(self.claims):
            csv = self.claims.to_csv(index=False, float_format="%.6g")
            atomic.write_text(folder.path / f"{stem}_controls.csv", csv)
            if len(told := self.experiment.headline(self.claims)):
                claimed, verdict = claim_lines(told, self.experiment.claim(self), EXPLAINED)
                text = "\n\n".join([claimed, claim_table(told).markdown(), verdict]) + "\n"
                atomic.write_text(folder.path / f"{stem}_controls.md", text)
        self.experiment.files(self, folder.path)
        for name, figure in self.figures.items():
            save(figure, folder.path / name)

    def _figure_files(self) -> list[Path]:
        assert self.path is not None
        return [self.path / f"{name}{suffix}" for name in self.figures for suffix in (".png", ".pdf")]

    def __repr__(self) -> str:
        where = f", in {self.path}" if self.path is not None else ""
        return f"{type(self.experiment).__name__} of {self.model_name}: {len(self.table):,} rows{where}"


OF_A_FOLDER = ("command", "request", "status", "created", "wall_seconds", "peak_memory_bytes", "argv", "environment",
               "version", "tables")  # fmt: skip
"""Entries of a record that are of the folder it lies in."""
