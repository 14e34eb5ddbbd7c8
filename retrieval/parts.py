"""The parts of an evaluation: groups of query files, each with a folder of its results."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.files import fingerprint_of, sha256_of
from etl.runtime.object_store import local_path
from retrieval.bundle import Bundle
from retrieval.config import RetrievalConfig

DONE = "done.json"
"""Written last: a part with it is complete."""
FORMAT = 2
"""Format version of the parts: those of other versions are removed."""


@dataclass(frozen=True)
class Part:
    """Consecutive query files of one split.

    Attributes:
        split: valid, test or next.
        number: index of its first file in the split.
        files: number of files.
        first: number of queries of the split before this part.
        rows: number of queries.
    """

    split: str
    number: int
    files: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"{self.split}-{self.number:05d}"


def parts_folder(config: RetrievalConfig, bundle: Bundle) -> Path:
    """The work folder with the parts of this evaluation; parts of other evaluations are removed."""
    output = local_path(config.output).absolute()
    folder = output.with_name(f".{output.name}.parts")
    options = {name: value for name, value in vars(config).items() if name not in ("output", "overwrite", "threads")}
    key = fingerprint_of([FORMAT, options, sha256_of(bundle.path / MANIFEST)])
    if not (folder / key).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / key).mkdir(parents=True)
    return folder / key


def join(paths: Iterable[Path], output: Path, schema: pa.Schema) -> None:
    """Concatenate Parquet files, one row group at a time."""
    with pq.ParquetWriter(output, schema, compression="zstd") as writer:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1 << 17):
                    writer.write_batch(batch.cast(schema))
