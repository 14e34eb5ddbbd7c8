"""The logs of a study, and the datasets of its variants."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.config import StudyOptions, words
from cluster.steps import Step, file_fingerprint, run_step
from cluster.study.experiment import Variant
from etl.dataset import STATISTICS
from etl.runtime.dataset_folder import MANIFEST, is_dataset
from etl.runtime.errors import InputError
from etl.runtime.files import fingerprint_of

TENREC_FILES = {
    "qk_video": "QK-video.csv",
    "qk_article": "QK-article.csv",
    "qb_video": "QB-video.csv",
    "qb_article": "QB-article.csv",
    "ctr": "ctr_data_1M.csv",
}
COLD_FILES = ("cold_data.csv", "cold_data_0.3.csv", "cold_data_0.7.csv")
"""Article clicks of users who are also in QK-video; the number is the share of cold users."""


@dataclass(frozen=True)
class Log:
    """A log of the study.

    Attributes:
        name: name in tables.
        scenario: scenario of `python -m etl`.
        path: path of the CSV file.
        command: command that creates it, arguments after `python -m`; empty for a user's file.
        history: log of the users' earlier behaviour, if any.
        converted_from: the log that it was converted from, if any.
    """

    name: str
    scenario: str
    path: Path
    command: tuple[str, ...] = ()
    history: Path | None = None
    converted_from: Log | None = None

    @property
    def original(self) -> Log:
        """The log before any conversion."""
        return self.converted_from or self

    @property
    def has_flat_rows(self) -> bool:
        """Whether it has, or can be generated as, rows of scenario `ctr`."""
        return self.scenario == "ctr" or (self.is_generated and self.scenario.endswith("video"))

    @property
    def is_generated(self) -> bool:
        """Whether the log is synthetic."""
        return self.command[:1] == ("etl.twin",)

    @property
    def is_movielens(self) -> bool:
        """Whether the log is MovieLens-100K."""
        return self.command[:1] == ("etl.movielens",)

    @property
    def truth_path(self) -> Path:
        """The file with the best possible scores of a synthetic log."""
        return self.path.with_name(f"{self.path.name}.truth.json")

    @property
    def has_truth(self) -> bool:
        """Whether it is synthetic and has best possible scores: those of flat rows have none."""
        return self.is_generated and "history=true" not in self.command

    def changed(self, options: tuple[str, ...]) -> Log:
        """The log with other generator options, under a different name."""
        if not options:
            return self
        path = self.path.with_name(f"{self.path.stem}-{fingerprint_of(list(options))[:8]}.csv")
        command = tuple(f"output={path}" if option.startswith("output=") else option for option in self.command)
        return Log(self.name, self.scenario, path, (*command, *options))

    def converted(self, program: str, folder: Path) -> Log:
        """This log converted by a program to scenario `ctr`, in a folder."""
        path_hash = fingerprint_of([str(self.path)])[:8]
        path = folder / f"{self.path.stem}-{path_hash}-{program.rpartition('.')[2]}.csv"
        command = (program, f"input={self.path}", f"output={path}")
        return Log(self.name, "ctr", path, command, converted_from=self)


def logs_of(options: StudyOptions) -> list[Log]:
    """The logs of the study.

    Raises:
        InputError: a file is missing.
    """
    work = Path(options.work).absolute()
    result = []
    if options.movielens:
        path = work / "logs" / "movielens.csv"
        result.append(Log("MovieLens-100K", "qb_video", path, ("etl.movielens", f"output={path}")))
    for entry in options.generated:
        scenario, users, items = entry.split()
        path = work / "logs" / f"{scenario}-{users}-{items}.csv"
        size = (f"users={users}", f"items={items}")
        result.append(
            Log(f"twin of {scenario}", scenario, path, ("etl.twin", f"output={path}", f"scenario={scenario}", *size))
        )
    if options.name == "kuairand":
        path = work / "logs" / "kuairand.csv"
        result.append(Log("KuaiRand", "qb_video", path, ("etl.kuairand", f"input={_input(options)}", f"output={path}")))
    if options.name == "tenrec":
        folder = _input(options)
        there = [(scenario, folder / name) for scenario, name in TENREC_FILES.items() if (folder / name).is_file()]
        result += [Log(path.stem, scenario, path) for scenario, path in there]
        history = folder / TENREC_FILES["qk_video"]
        cold = [folder / name for name in COLD_FILES if history.is_file() and (folder / name).is_file()]
        result += [Log(path.stem, "qk_video", path, history=history) for path in cold]
    for entry in options.logs:
        scenario, _, path_text = entry.partition(":")
        path = Path(path_text).absolute()
        if not path.is_file():
            raise InputError("study.logs=[SCENARIO:FILE,…] with files", entry, "write study.logs=[qb_video:log.csv]")
        result.append(Log(path.stem, scenario, path))
    if not result:
        raise InputError(
            f"logs for study={options.name}", "none", f"study.input=DIR with {', '.join(TENREC_FILES.values())}"
        )
    return distinct_names(result)


def distinct_names(logs: list[Log]) -> list[Log]:
    """The logs, each once, with names of their own: equal ones get the file, its folder, or a number.

    >>> paths = [Path("a/L.csv"), Path("b/L.csv"), Path("a/L.csv"), Path("c/M.csv")]
    >>> [log.name for log in distinct_names([Log(path.stem, "qb_video", path) for path in paths])]
    ['L (a)', 'L (b)', 'M']
    """
    logs = list({(log.path, log.scenario): log for log in logs}.values())
    details = ([log.path.stem, log.path.parent.name, str(number)] for number, log in enumerate(logs, 1))
    for detail_of in zip(*details, strict=True):
        count = Counter(log.name for log in logs)
        logs = [
            replace(log, name=f"{log.name} ({detail})") if count[log.name] > 1 and detail != log.name else log
            for log, detail in zip(logs, detail_of, strict=True)
        ]
    return logs


def _input(options: StudyOptions) -> Path:
    if options.input is None or not Path(options.input).is_dir():
        got = options.input or "nothing"
        raise InputError(f"study.input=DIR, the folder of the {options.name} files", got, "name the folder")
    return Path(options.input).absolute()


@dataclass(frozen=True)
class Data:
    """A dataset of the study.

    Attributes:
        log: the log that it was made from.
        path: path of the folder.
        scenario: scenario that it was read with.
    """

    log: Log
    path: Path
    scenario: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The dataset's manifest."""
        return dict(json.loads((self.path / MANIFEST).read_text()))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the dataset's content."""
        return str(self.manifest["fingerprint"])

    @property
    def skipped(self) -> int:
        """Number of retained unclicked rows without action."""
        return int(json.loads((self.path / STATISTICS).read_text())["kept"].get("skip") or 0)

    @property
    def best_possible(self) -> dict[str, float]:
        """Best possible test scores of a generated log; empty for others."""
        try:
            return dict(json.loads(self.log.truth_path.read_text())["test"])
        except (OSError, ValueError, KeyError):
            return {}


def make_data(options: StudyOptions, log: Log, variant: Variant) -> Data | None:
    """The dataset of a variant, built if missing; None if its converter finds no rows in the log."""
    work, log = Path(options.work).absolute(), log.changed(variant.log if log.is_generated else ())
    _make_log(log, work)
    if variant.converter:
        log = log.converted(variant.converter, work / "logs")
        try:
            _make_log(log, work)
        except InputError:  # already printed
            return None
    arguments = [*words("study.etl", options.etl), *variant.protocol]
    inputs = [log.path]
    if variant.history and log.history:
        inputs, arguments = [log.history, log.path], [*arguments, f"users_from={log.path}"]
    name = f"{log.path.stem}-{fingerprint_of([str(log.path), arguments])[:8]}"
    path, scenario = work / "data" / name, variant.scenario or log.scenario
    files = ",".join(map(str, inputs))
    read = f"input=[{files}]" if len(inputs) > 1 else f"input={files}"
    command = ["etl", read, f"output={path}", f"scenario={scenario}", "overwrite=true", *arguments]
    run_step(Step(f"data {name}", command, path, list(map(file_fingerprint, inputs)), is_dataset), work / "steps")
    return Data(log, path, scenario)


def _make_log(log: Log, work: Path) -> None:
    """Run the program that creates a log, unless it is up to date or a user's file."""
    if not log.command:
        return
    read = [option.partition("=")[2] for option in log.command if option.startswith("input=")]

    def is_complete(path: Path) -> bool:
        return path.is_file() and (not log.has_truth or log.truth_path.is_file())

    inputs = [file_fingerprint(Path(name)) for name in read]
    run_step(Step(f"log {log.path.stem}", list(log.command), log.path, inputs, is_complete), work / "steps")
