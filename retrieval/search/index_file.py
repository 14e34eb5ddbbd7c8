"""Saved indexes with their inputs' fingerprints and tuning results, memory-mapped for reuse."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file, fingerprint_of, sha256_of, write_json
from retrieval.bundle_folder import SEARCH_FOLDER
from retrieval.search.index import KINDS, SPACES, Catalogue, Index
from retrieval.search.tuning import Fidelity

RECORD: dict[str, Any] = {
    "made_from": str,
    "sha256": str,
    "kind": str,
    "space": str,
    "build_seconds": int | float,
    "parameters": dict,
}
"""Required fields of a record and their types."""
HINT = "delete it with its index"


def origin(bundle_manifest: Path, catalogue: Catalogue) -> str:
    """Fingerprint of an index's inputs: the bundle and the candidates."""
    return fingerprint_of([sha256_of(bundle_manifest), len(catalogue.item), int(catalogue.item.sum(dtype=np.int64))])


class IndexFile:
    """One index file and its record.

    Args:
        path: path of the index file; the record has the suffix `.json`.
        made_from: `origin` of the evaluated bundle and candidates.
    """

    def __init__(self, path: Path, made_from: str) -> None:
        self.path, self.made_from = path, made_from
        self.record_path = path.with_name(path.name + ".json")

    @classmethod
    def for_bundle(cls, bundle: Path, kind: str, made_from: str) -> IndexFile:
        """The index file in the run folder of a bundle."""
        return cls(bundle.absolute().parent / SEARCH_FOLDER / f"{kind}-{made_from[:16]}.faiss", made_from)

    def record(self) -> dict[str, Any]:
        """The record of the index; empty if there is none.

        Raises:
            InputError: the index belongs to another bundle or other candidates.
        """
        try:
            result = json.loads(self.record_path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise InputError("a readable index record", self.record_path, HINT) from None
        if not isinstance(result, dict) or not all(isinstance(result.get(name), kind) for name, kind in RECORD.items()):
            raise InputError(f"an index record with {', '.join(RECORD)}", self.record_path, HINT)
        if (
            result["kind"] not in KINDS
            or result["space"] not in SPACES
            or not isinstance(result.get("tuned", {}), dict)
        ):
            raise InputError(f"an index of {', '.join(KINDS)} in its record", result["kind"], HINT)
        if result["made_from"] != self.made_from:
            raise InputError("an index of this bundle and these candidates", self.path, "name another index_file")
        return result

    def load(self, catalogue: Catalogue) -> Index | None:
        """Memory-map the index; None if there is none.

        Raises:
            InputError: the file was changed.
        """
        record = self.record()
        if not record or not self.path.is_file():
            return None
        if sha256_of(self.path) != record["sha256"]:
            raise InputError("the index file that was written", f"{self.path} with other bytes", "delete it")
        flags = faiss.IO_FLAG_MMAP if record["kind"].startswith("ivf") else 0
        result = faiss.read_index(str(self.path), flags)
        index = Index(record["kind"], catalogue, result, record["build_seconds"], record["space"])
        index.parameters = dict(record["parameters"])
        return index

    def save(self, index: Index, extra: dict[str, Any]) -> None:
        """Write the index, then its record; warns if the folder is not writable."""
        try:
            with atomic_file(self.path) as file:
                faiss.write_index(index.faiss_index, str(file))
        except (OSError, RuntimeError) as error:
            print(f"warning: the index is not saved: {error}", file=sys.stderr, flush=True)
            return
        record: dict[str, Any] = {"made_from": self.made_from, "sha256": sha256_of(self.path), "kind": index.kind}
        record |= {"space": index.space, "build_seconds": index.build_seconds, "parameters": index.parameters}
        self._write_record(record | extra)

    def tuned(self, fidelity: float) -> dict[str, Any] | None:
        """Tuning result for a fidelity: `effort`, `refine`, `curve`, `test`; None if not tuned.

        Raises:
            InputError: the record was changed.
        """
        result = self.record().get("tuned", {}).get(str(fidelity))
        if not isinstance(result, dict) or set(result.get("test", ())) != {entry.name for entry in fields(Fidelity)}:
            return None  # written by another version
        numbers = [result.get("effort"), result.get("refine"), result["test"]["queries"]]
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or not isinstance(result.get("curve"), list):
            raise InputError("effort and refine of at least 1 in the index record", self.record_path, HINT)
        may_be_null = ("hr_ratio", "hr_ratio_low")
        numeric = (isinstance(v, int | float) or (v is None and n in may_be_null) for n, v in result["test"].items())
        if not all(numeric):
            raise InputError("numbers in the index record", self.record_path, HINT)
        return result

    def save_tuning(self, fidelity: float, index: Index, curve: list[dict[str, Any]], test: Fidelity) -> dict[str, Any]:
        """Save the tuning result, and return it."""
        record = self.record()
        result = {"effort": index.search_effort, "refine": index.refine, "curve": curve, "test": asdict(test)}
        if record:
            record.setdefault("tuned", {})[str(fidelity)] = result
            self._write_record(record)
        return result

    def _write_record(self, record: dict[str, Any]) -> None:
        """Write the record; warns if the folder is not writable or full."""
        try:
            write_json(self.record_path, record)
        except OSError as error:
            print(f"warning: the index's record is not saved: {error}", file=sys.stderr, flush=True)
