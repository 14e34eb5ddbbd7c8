"""Counted sources on disk: built once, memory-mapped, with input fingerprints and a hash per file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from etl.dataset import Dataset
from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file, fingerprint_of, sha256_of, write_json
from retrieval.sources.counts import cosine_lists, successor_lists
from retrieval.sources.scores import ItemKNNScores, Scores, SuccessorScores, VSkNNScores
from retrieval.sources.sessions import TrainSessions
from retrieval.sources.stan import Stan

VERSION = 3
"""Format version of the files."""
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SourceOptions:
    """Options of counted sources.

    Attributes:
        held_out: number of final clicks of each session that are not counted.
        rules_per_item: maximum successors per item.
        gaps: maximum distance of a successor in clicks.
        neighbours: number of neighbours: items of ItemKNN, sessions of V-SkNN.
    """

    held_out: int
    rules_per_item: int
    gaps: int
    neighbours: int


@dataclass(frozen=True)
class Counted:
    """How a counted source is built and opened.

    Attributes:
        options: names of the options that it depends on.
        build: builds arrays from sessions, options and threads.
        open: builds scores from arrays and options.
        stored: name of the stored arrays, if shared by several sources; default: the source's name.
    """

    options: tuple[str, ...]
    build: Callable[[TrainSessions, SourceOptions, int], Arrays]
    open: Callable[[Arrays, SourceOptions], Scores]
    stored: str = ""


def _arrays(matrix: sparse.csr_matrix) -> Arrays:
    return {"score": matrix.data, "item": matrix.indices, "offset": matrix.indptr}


def _lists(arrays: Arrays) -> sparse.csr_matrix:
    size = len(arrays["offset"]) - 1
    return sparse.csr_matrix((arrays["score"], arrays["item"], arrays["offset"]), shape=(size, size))


def _session_arrays(sessions: TrainSessions, options: SourceOptions, threads: int) -> Arrays:
    result = VSkNNScores.of(sessions, options.neighbours)
    arrays = {"user_id": result.user_id, "item": result.has.indices, "offset": result.has.indptr}
    arrays |= {"session": result.of_item.indices, "session_offset": result.of_item.indptr}
    return arrays | {"click": sessions.items, "click_offset": sessions.offset}


def _ones(arrays: Arrays, columns: str, offset: str, n_columns: int) -> sparse.csr_matrix:
    """Binary matrix with ones at stored columns."""
    if ONES not in arrays:  # one array of ones, shared by all matrices
        arrays[ONES] = np.ones(max(len(arrays["item"]), len(arrays["session"])), np.float32)
    ones = arrays[ONES][: len(arrays[columns])]
    return sparse.csr_matrix((ones, arrays[columns], arrays[offset]), shape=(len(arrays[offset]) - 1, n_columns))


def _near_sessions(arrays: Arrays, options: SourceOptions) -> Scores:
    has = _ones(arrays, "item", "offset", len(arrays["session_offset"]) - 1)
    of_item = _ones(arrays, "session", "session_offset", has.shape[0])
    return VSkNNScores(arrays["user_id"], has, of_item, options.neighbours)


def _stan(arrays: Arrays, options: SourceOptions) -> Scores:
    of_item = _ones(arrays, "session", "session_offset", len(arrays["offset"]) - 1)
    sessions = TrainSessions(arrays["user_id"], arrays["click_offset"], arrays["click"], of_item.shape[0] - 1)
    return Stan.of(sessions, of_item, options.neighbours)


SESSIONS, ONES = "sessions", "ones"
"""Stored arrays of the session-neighbour sources, and the one among them that is not stored but recreated."""


COUNTED: Mapping[str, Counted] = {
    "sequential_rules": Counted(
        ("rules_per_item", "gaps"),
        lambda s, o, threads: _arrays(successor_lists(s, o.gaps, o.rules_per_item, threads)),
        lambda arrays, _: SuccessorScores(_lists(arrays)),
    ),
    "markov": Counted(
        ("rules_per_item",),
        lambda s, o, threads: _arrays(successor_lists(s, 1, o.rules_per_item, threads)),
        lambda arrays, _: SuccessorScores(_lists(arrays)),
    ),
    "item_knn": Counted(
        ("neighbours",),
        lambda s, o, threads: _arrays(cosine_lists(s, o.neighbours, threads)),
        lambda arrays, _: ItemKNNScores(_lists(arrays)),
    ),
    "v_sknn": Counted((), _session_arrays, _near_sessions, SESSIONS),
    "stan": Counted((), _session_arrays, _stan, SESSIONS),
}


def stored_name(name: str) -> str:
    """Name of the stored arrays of a source."""
    return COUNTED[name].stored or name


class SourceFiles:
    """The files of one counted source.

    Args:
        folder: folder of a run's sources.
        name: name of the source.
        made_from: fingerprint of the dataset and options.
    """

    def __init__(self, folder: Path, name: str, made_from: str) -> None:
        self.folder, self.made_from = folder / f"{name}-{made_from[:16]}", made_from
        self.record = self.folder / "record.json"

    def load(self) -> Arrays | None:
        """Memory-map the arrays; None if there are none.

        Raises:
            InputError: a file was changed.
        """
        try:
            record = json.loads(self.record.read_text())
            hashes = dict(record["sha256"]) if record["made_from"] == self.made_from else {}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError("a readable record of a source", self.record, f"delete {self.folder}") from None
        for name, sha256 in hashes.items():
            path = self.folder / name
            if not path.is_file() or sha256_of(path) != sha256:
                raise InputError(
                    "the source file that was written", f"{path} with other bytes", f"delete {self.folder}"
                )
        return {name.removesuffix(".npy"): np.load(self.folder / name, mmap_mode="r") for name in hashes} or None

    def save(self, arrays: Arrays, details: dict[str, Any]) -> None:
        """Write the arrays, then the record; warns if the folder is not writable."""
        try:
            for name, values in arrays.items():
                with atomic_file(self.folder / f"{name}.npy") as file:
                    np.save(file, values, allow_pickle=False)
            hashes = {f"{name}.npy": sha256_of(self.folder / f"{name}.npy") for name in arrays}
            write_json(self.record, {"made_from": self.made_from, "sha256": hashes, **details})
        except OSError as error:
            print(f"warning: the source is not stored: {error}", file=sys.stderr, flush=True)


def open_counted(
    names: Sequence[str], dataset: Dataset, folder: Path, options: SourceOptions, threads: int = 1
) -> dict[str, Scores]:
    """Open counted sources by name; builds and stores missing ones in the folder."""
    sessions = cache(lambda: TrainSessions.of(dataset, options.held_out))
    stored: dict[str, Arrays] = {}
    for name in names:
        source, file = COUNTED[name], stored_name(name)
        if file in stored:
            continue
        parameters = {key: value for key, value in asdict(options).items() if key in ("held_out", *source.options)}
        made_from = fingerprint_of([VERSION, dataset.manifest.fingerprint, file, parameters])
        files = SourceFiles(folder, file, made_from)
        arrays = files.load()
        if arrays is None:
            begin = time.perf_counter()
            arrays = source.build(sessions(), options, threads)
            files.save(arrays, {**parameters, "build_seconds": time.perf_counter() - begin})
        stored[file] = arrays
    return {name: COUNTED[name].open(stored[stored_name(name)], options) for name in names}
