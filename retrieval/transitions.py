"""Counted transitions (item to item) as a sparse term of a model's score.

A model with transitions scores item i after the clicks x_1 (the last), x_2, … by

    q · v_i + w_1 Σ_{g ≤ 3} log(1 + r(x_g, i)) / g + w_2 Σ_{g ≤ 12} c(x_g, i) + w_3 log(1 + n(x_1, i))

r is the score of sequential rules (clicks on i up to ten clicks after one on x, weighted 1 / gap), c the cosine of
co-occurrence in train sessions, n the number of clicks on i directly after one on x (first-order Markov). The weights
w ≥ 0 are per query. Since the term is never negative, the best k items are among the k best by inner product and the
items with a term, so the search stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from etl.runtime.lookup import lookup
from retrieval.bundle import TRANSITIONS, TRANSITIONS_SCHEMA, Bundle
from retrieval.bundle_checks import HINT
from retrieval.queries import Queries
from retrieval.sources.scores import ItemKNNScores, SuccessorScores
from retrieval.sources.sparse_rows import row_of_entries
from retrieval.sources.store import SourceOptions, open_counted

STEPS = {"rules": tuple(1.0 / gap for gap in (1, 2, 3)), "cosine": (1.0,) * 12, "markov": (1.0,)}
"""Weights of the last clicks by term, latest first."""
LONGEST = max(map(len, STEPS.values()))
SOURCE_OF_TERM = {"rules": "sequential_rules", "cosine": "item_knn", "markov": "markov"}
"""The counted source of each term."""
LOGARITHMIC = ("rules", "markov")
"""Terms that are log(1 + count)."""
FIRST_TERMS = 2
"""Number of terms of earlier versions, which had no Markov term; their bundles and runs are still read."""
PER_ITEM, GAPS = 100, 10
"""Maximum items retained per item; maximum distance of a rule in clicks."""
ROWS_AT_ONCE, ENTRIES_AT_ONCE = 1 << 20, 1 << 22


@dataclass(frozen=True)
class Transitions:
    """The counts by term: float32 `[n_items + 1, n_items + 1]`, sorted columns, row 0 empty."""

    terms: dict[str, sparse.csr_matrix]

    def first(self, number: int) -> Transitions:
        """The first terms alone: a run of an earlier version has weights of `FIRST_TERMS`."""
        return Transitions(dict(list(self.terms.items())[:number]))

    def features(self, context_NG: npt.NDArray[np.integer]) -> list[sparse.csr_matrix]:
        """Unweighted terms, float64 `[N, n_items + 1]` each.

        Args:
            context_NG: last clicks, latest first, padded with 0.
        """
        out = []
        for name, matrix in self.terms.items():
            steps = STEPS[name][: context_NG.shape[1]]
            n = len(context_NG)
            # Convert only the needed rows to float64: scipy would copy the complete matrix.
            items, position = np.unique(context_NG[:, : len(steps)], return_inverse=True)
            rows = matrix[items].astype(np.float64)
            indptr = np.arange(n + 1) * len(steps)
            clicks = sparse.csr_matrix((np.tile(steps, n), position.ravel(), indptr), shape=(n, len(items)))
            result = (clicks @ rows).tocsr()
            result.sort_indices()
            out.append(result)
        return out

    def scores(self, context_NG: npt.NDArray[np.integer], weight_NT: npt.NDArray[np.floating]) -> sparse.csr_matrix:
        """The weighted sum of the terms, float64 `[N, n_items + 1]`, sorted columns; `weight_NT` is at least 0."""
        total = sparse.csr_matrix((len(context_NG), next(iter(self.terms.values())).shape[0]))
        for number, result in enumerate(self.features(context_NG)):
            result.data *= weight_NT[row_of_entries(result), number]
            total = total + result
        total.eliminate_zeros()
        return total.tocsr()

    def scores_of(self, queries: Queries) -> sparse.csr_matrix:
        """The weighted sum of the terms for queries, float64 `[Q, n_items + 1]`."""
        return self.scores(
            last_clicks(queries.seen, queries.seen_offset[1:], queries.n_seen), queries.transition_weight
        )


def last_clicks(click_N: npt.NDArray[np.integer], end_Q: IntArray, n_seen_Q: IntArray) -> IntArray:
    """The last clicks of sessions `[Q, LONGEST]`, latest first, padded with 0.

    Args:
        click_N: clicks of all sessions, oldest first.
        end_Q: where each session's seen clicks end in `click_N`.
        n_seen_Q: number of seen clicks.
    """
    out = np.zeros((len(end_Q), LONGEST), np.int64)
    for back in range(1, LONGEST + 1):
        has = n_seen_Q >= back
        out[has, back - 1] = click_N[end_Q[has] - back]
    return out


def open_transitions(dataset: Dataset, folder: Path, held_out: int, threads: int = 1) -> Transitions:
    """Count transitions over a dataset's sessions without their last `held_out` clicks, or open saved counts.

    Args:
        dataset: dataset with sessions.
        folder: folder of saved counts, shared with the baselines.
        held_out: number of final clicks of each session that are not counted.
        threads: threads for counting.
    """
    options = SourceOptions(held_out, rules_per_item=PER_ITEM, gaps=GAPS, neighbours=PER_ITEM)
    counted = open_counted(list(SOURCE_OF_TERM.values()), dataset, folder, options, threads)
    lists = {}
    for name, source in SOURCE_OF_TERM.items():
        scores = counted[source]
        assert isinstance(scores, SuccessorScores | ItemKNNScores)
        lists[name] = scores.lists
    return transitions_from_counts(lists)


def transitions_from_counts(counts: dict[str, sparse.csr_matrix]) -> Transitions:
    """Terms from counts by term: rule scores, cosines, direct successors."""
    terms = {}
    for name, matrix in counts.items():
        value = np.log1p(matrix.data) if name in LOGARITHMIC else matrix.data
        terms[name] = sparse.csr_matrix((value, matrix.indices, matrix.indptr), shape=matrix.shape)
    return Transitions(terms)


def write_transitions(folder: Path, transitions: Transitions) -> None:
    """Write the bundle's folder of transitions, one file per term."""
    folder.mkdir()
    for name, matrix in transitions.terms.items():
        with pq.ParquetWriter(folder / f"{name}.parquet", TRANSITIONS_SCHEMA, compression="zstd") as writer:
            for begin in range(0, matrix.shape[0], ROWS_AT_ONCE):
                part = matrix[begin : begin + ROWS_AT_ONCE]
                item = (row_of_entries(part) + begin).astype(np.int32)
                columns = [pa.array(values) for values in (item, part.indices.astype(np.int32), part.data)]
                writer.write_table(pa.table(columns, schema=TRANSITIONS_SCHEMA))


def read_transitions(bundle: Bundle) -> Transitions | None:
    """Read the transitions of a bundle; None if it has none.

    Raises:
        InputError: items outside the catalogue or unsorted, or a value that is not positive.
    """
    size = bundle.manifest.n_items + 1
    terms = {}
    for entry in bundle.files_by_kind.get(TRANSITIONS, []):
        terms[Path(entry.path).stem] = _read_term(bundle.path / entry.path, entry.path, size)
    names = list(STEPS)[: max(len(terms), FIRST_TERMS)]
    if terms and set(terms) != set(names):
        raise InputError(f"transitions {', '.join(names)}", ", ".join(terms), HINT)
    return Transitions({name: terms[name] for name in names}) if terms else None


def _read_term(path: Path, name: str, size: int) -> sparse.csr_matrix:
    """Read the term of a file, with little memory overhead."""
    with pq.ParquetFile(path) as file:
        other, value = (np.empty(file.metadata.num_rows, kind) for kind in (np.int32, np.float32))
        length, last, end = np.zeros(size, np.int64), -1, 0
        for batch in file.iter_batches(ENTRIES_AT_ONCE, columns=TRANSITIONS_SCHEMA.names):
            items, others, values = (batch[column].to_numpy() for column in TRANSITIONS_SCHEMA.names)
            if min(items.min(), others.min()) < 1 or max(items.max(), others.max()) >= size:
                raise InputError(f"transitions between items 1..{size - 1}", "another item", HINT)
            pair = items.astype(np.int64) * size + others
            if pair[0] <= last or (np.diff(pair) <= 0).any() or not ((values > 0) & np.isfinite(values)).all():
                raise InputError("transitions in rising order, each once, above 0", name, HINT)
            length += np.bincount(items, minlength=size)
            begin, end, last = end, end + len(batch), int(pair[-1])
            other[begin:end], value[begin:end] = others, values
    return sparse.csr_matrix((value, other, np.concatenate([[0], np.cumsum(length)])), shape=(size, size))


def add_to_lists(
    term: sparse.csr_matrix,
    score_QK: npt.NDArray[np.float64],
    item_QK: npt.NDArray[np.integer],
    product_QM: npt.NDArray[np.float64],
    k: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    """Merge the items with a term into lists by inner product, and take the `k` best by the sum.

    Args:
        term: float64 `[Q, n_items + 1]`, candidates only.
        score_QK: inner products of the listed items.
        item_QK: their dense ids, 0 = none.
        product_QM: inner products of the term's entries by row, right-padded.
        k: length of the lists.

    Returns:
        Float64 scores and dense ids `[Q, k]`, best first, ties by ascending id, padded with -inf and 0.
    """
    length = np.diff(term.indptr)
    inside = np.arange(product_QM.shape[1]) < length[:, None]
    item_QM, term_QM = np.zeros(inside.shape, np.int64), np.zeros(inside.shape)
    item_QM[inside], term_QM[inside] = term.indices, term.data
    query = np.arange(len(length))[:, None]
    key = (query << 32 | item_QM)[inside]  # sorted, as the term's columns are
    listed = query << 32 | item_QK
    twice = lookup(key, listed)[1]
    score = np.concatenate(
        [np.where(twice | (item_QK == 0), -np.inf, score_QK), np.where(inside, product_QM + term_QM, -np.inf)], axis=1
    )
    item = np.concatenate([np.where(twice, 0, item_QK), item_QM], axis=1)
    order = np.lexsort((np.where(item == 0, np.iinfo(np.int64).max, item), -score), axis=1)[:, :k]
    return np.take_along_axis(score, order, 1), np.take_along_axis(item, order, 1)


def padded(values: npt.NDArray[np.int64], length_Q: npt.NDArray[np.integer], fill: int) -> IntArray:
    """Right-pad flat values of Q rows with `fill` to `[Q, longest]`."""
    out = np.full((len(length_Q), int(length_Q.max(initial=0))), fill, np.int64)
    out[np.arange(out.shape[1]) < length_Q[:, None]] = values
    return out
