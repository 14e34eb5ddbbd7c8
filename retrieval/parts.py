"""An evaluation in parts: some files of queries each, ranked here or elsewhere, once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.contract import Dataset, open_dataset
from etl.dataset_folder import MANIFEST
from etl.folder import InputError, fingerprint_of, sha256_of, write_json
from etl.progress import ProgressLine
from etl.remote import place
from retrieval.bundle import QUERY_SPLITS, Bundle, Queries, lists_array, open_bundle
from retrieval.config import RetrievalConfig
from retrieval.index import Index
from retrieval.lists import places_of_listed
from retrieval.ranking import (
    MODEL,
    Ranker,
    RankWriter,
    baseline_rankers,
    check_targets,
    model_ranker,
    search_unseen,
)
from retrieval.sums import Facts, RankingResult

CLICKS_AFTER_QUERY = {"valid": 2, "test": 1}
DONE = "done.json"
PART_QUERIES = 10_000
"""Small files make a part together up to so many queries: each part has a cost of its own."""
ALWAYS_ALL = (MODEL, "popularity")
"""Rankers that are cheap enough for all queries."""
TOPK_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("items", pa.list_(pa.int32())),
        ("item_ids", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Part:
    """Some files of queries of one split, one after another.

    Attributes:
        split: valid, test or next.
        number: of its first file among those of the split.
        files: how many there are.
        first: queries of the split before it.
        rows: its queries.
    """

    split: str
    number: int
    files: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        """Of the part's folder."""
        return f"{self.split}-{self.number:05d}"


@dataclass
class Evaluation:
    """What every part needs, opened once in a process.

    Attributes:
        config: of the evaluation.
        dataset, bundle: opened.
        index: over the candidates, its effort tuned.
    """

    config: RetrievalConfig
    dataset: Dataset
    bundle: Bundle
    index: Index

    @cached_property
    def facts(self) -> Facts:
        """By which queries are told apart."""
        return Facts.of(self.dataset)

    @cached_property
    def item_id(self) -> npt.NDArray[np.int64]:
        """Raw ids by dense id `[n_items + 1]`, 0 for padding."""
        return np.concatenate([[0], self.dataset.items(["item_id"])["item_id"].to_numpy()])

    @cached_property
    def rankers(self) -> dict[str, Ranker]:
        """The model and the baselines."""
        return {
            MODEL: model_ranker(self.index, self.config),
            **baseline_rankers(self.dataset, self.bundle, self.index, self.config),
        }

    @property
    def ranker_names(self) -> list[str]:
        """The model and the baselines, which need not be made for their names."""
        return [MODEL, *dict.fromkeys(["popularity", *self.config.baselines])]

    def parts(self) -> list[Part]:
        """All parts, in order: whole files, small ones together up to `PART_QUERIES`."""
        found: list[Part] = []
        for split in (*CLICKS_AFTER_QUERY, "next"):
            first, part = 0, None
            for number, entry in enumerate(self.bundle.parts.get(f"queries-{split}", [])):
                if part and part.rows + entry.rows <= PART_QUERIES:
                    part = replace(part, files=part.files + 1, rows=part.rows + entry.rows)
                    found[-1] = part
                else:
                    part = Part(split, number, 1, first, entry.rows)
                    found.append(part)
                first += entry.rows
        return found

    def batches(self, part: Part) -> Iterator[Queries]:
        """The part's queries."""
        entries = self.bundle.parts[f"queries-{part.split}"]
        return self.bundle.queries_of(entries[part.number : part.number + part.files])

    def run(self, part: Part, folder: Path) -> None:
        """Make `folder/PART`, whole or not at all; a part that is there is not made again."""
        path = folder / part.name
        if (path / DONE).is_file():
            return
        writing = folder / f".{part.name}.writing"
        shutil.rmtree(writing, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        writing.mkdir(parents=True)
        (self._recommend if part.split == "next" else self._rank)(part, writing)
        write_json(writing / DONE, {"rows": part.rows})
        writing.rename(path)

    def _rank(self, part: Part, folder: Path) -> None:
        config, n_items = self.config, self.dataset.manifest.n_items
        sums = {name: RankingResult(config.cutoffs, n_items) for name in self.rankers}
        total = sum(entry.rows for entry in self.bundle.parts[f"queries-{part.split}"])
        every, begin = -(-total // config.baseline_queries), part.first
        with RankWriter(folder / "ranks.parquet", config.deepest) as ranks:
            for queries in self.batches(part):
                check_targets(queries)
                sample = queries.take(np.flatnonzero((np.arange(len(queries)) + begin) % every == 0))
                begin += len(queries)
                for name, ranker in self.rankers.items():
                    asked = queries if name in ALWAYS_ALL else sample
                    if not len(asked):
                        continue
                    started = perf_counter()
                    rank, lists = ranker(asked)
                    sums[name].seconds += perf_counter() - started
                    sums[name].add(asked, CLICKS_AFTER_QUERY[part.split], rank, lists, self.facts)
                    ranks.add(name, part.split, asked, rank)
        for name, found in sums.items():
            found.write(folder / name)

    def _recommend(self, part: Part, folder: Path) -> None:
        """The best unseen candidates after all kept clicks."""
        k = self.config.deepest
        with pq.ParquetWriter(folder / "topk.parquet", TOPK_SCHEMA, compression="zstd") as writer:
            for queries in self.batches(part):
                score, listed = search_unseen(self.index, queries, k)
                order = places_of_listed(listed, k)
                items, scores = np.take_along_axis(listed, order, 1), np.take_along_axis(score, order, 1)
                found = items > 0
                offset = np.concatenate([[0], np.cumsum(found.sum(axis=1))])
                columns = (items[found].astype(np.int32), self.item_id[items[found]], scores[found].astype(np.float32))
                arrays = [pa.array(queries.user_id), *(lists_array(offset, values) for values in columns)]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=TOPK_SCHEMA))

    def merged(self, folder: Path, split: str) -> dict[str, dict[str, Any]]:
        """The metrics of a split by ranker, added up in the order of the parts."""
        parts, out = [part for part in self.parts() if part.split == split and part.rows], {}
        for name in self.ranker_names if parts else []:
            whole = RankingResult(self.config.cutoffs, self.dataset.manifest.n_items)
            for part in parts:
                whole.add_written(folder / part.name / name)
            out[name] = whole.metrics(self.facts.train_clicks, len(self.index.catalogue.item))
        return out


RunParts = Callable[[Evaluation, list[Part], Path], None]
"""Sees to it that every part stands in the folder."""


def run_here(evaluation: Evaluation, parts: list[Part], folder: Path) -> None:
    """Make all parts in this process, telling how far it is."""
    total, done, line = sum(part.rows for part in parts), 0, ProgressLine()
    for part in parts:
        if not (folder / part.name / DONE).is_file():
            line.update("evaluating", done, total, "queries")
            evaluation.run(part, folder)
        done += part.rows
    line.close()


def parts_folder(config: RetrievalConfig, bundle: Bundle) -> Path:
    """Where the parts of this very evaluation lie; those of another one are removed."""
    output = place(config.output).absolute()
    folder = output.with_name(f".{output.name}.parts")
    options = {name: value for name, value in vars(config).items() if name not in ("output", "overwrite", "threads")}
    key = fingerprint_of([options, sha256_of(bundle.path / MANIFEST), PART_QUERIES])
    if not (folder / key).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / key).mkdir(parents=True)
    return folder / key


def join(paths: Iterable[Path], output: Path, schema: pa.Schema) -> None:
    """Parquet files one after another in one, a row group at a time."""
    with pq.ParquetWriter(output, schema, compression="zstd") as writer:
        for path in paths:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(1 << 17):
                    writer.write_batch(batch.cast(schema))


def open_inputs(config: RetrievalConfig, *, verify: bool = True) -> tuple[Dataset, Bundle]:
    """The dataset and the bundle made from it; `verify` hashes all files. The search's threads are set."""
    faiss.omp_set_num_threads(config.threads or faiss.omp_get_max_threads())
    dataset = open_dataset(config.data, verify=verify)
    bundle = open_bundle(config.bundle, dataset=dataset.manifest.fingerprint, verify=verify)
    needed = [split for split in QUERY_SPLITS if not (bundle.manifest.refit and split == "valid")]
    missing = [split for split in needed if bundle.has_vectors and not bundle.n_queries(split)]
    if missing:
        raise InputError(f"a bundle with {missing[0]} queries", "none", "export the bundle again")
    return dataset, bundle
