"""Indexes kept on disk with what they were made from and how they were tuned, mapped into memory and used again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from etl.folder import InputError, fingerprint_of, sha256_of, write_json
from retrieval.index import Catalogue, Fidelity, Index

FOLDER = "indexes"


def origin(bundle_manifest: Path, catalogue: Catalogue) -> str:
    """Fingerprint of what an index is built over: the bundle, and which of its items are candidates."""
    return fingerprint_of([sha256_of(bundle_manifest), len(catalogue.item), int(catalogue.item.sum(dtype=np.int64))])


class Stored:
    """One index file and the record beside it.

    Args:
        path: of the index file; the record has `.json` behind it.
        made_from: `origin` of the bundle and candidates that are evaluated.
    """

    def __init__(self, path: Path, made_from: str) -> None:
        self.path, self.made_from = path, made_from
        self.record_path = path.with_name(path.name + ".json")

    @classmethod
    def beside(cls, bundle: Path, kind: str, made_from: str) -> Stored:
        """The place for an index in the run folder of a bundle."""
        return cls(bundle.absolute().parent / FOLDER / f"{kind}-{made_from[:16]}.faiss", made_from)

    def record(self) -> dict[str, Any]:
        """What is known of the index; empty where there is none.

        Raises:
            InputError: the index belongs to another bundle or other candidates.
        """
        try:
            found = dict(json.loads(self.record_path.read_text()))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise InputError("a readable index record", self.record_path, "delete it with its index") from None
        if found.get("made_from") != self.made_from:
            raise InputError("an index of this bundle and these candidates", self.path, "name another index_file")
        return found

    def load(self, catalogue: Catalogue) -> Index | None:
        """The index, mapped into memory; None where there is none.

        Raises:
            InputError: the file is not the one that was written.
        """
        record = self.record()
        if not record or not self.path.is_file():
            return None
        if sha256_of(self.path) != record["sha256"]:
            raise InputError("the index file that was written", f"{self.path} with other bytes", "delete it")
        flags = faiss.IO_FLAG_MMAP if record["kind"].startswith("ivf") else 0
        found = faiss.read_index(str(self.path), flags)
        index = Index(record["kind"], catalogue, found, record["build_seconds"], record["space"])
        index.parameters = dict(record["parameters"])
        return index

    def save(self, index: Index, extra: dict[str, Any]) -> None:
        """Write the index, then its record; a folder that may not be written costs a warning."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            faiss.write_index(index.faiss_index, str(temporary))
            temporary.replace(self.path)
        except (OSError, RuntimeError) as error:
            print(f"warning: the index is not kept: {error}", flush=True)
            return
        record: dict[str, Any] = {"made_from": self.made_from, "sha256": sha256_of(self.path), "kind": index.kind}
        record |= {"space": index.space, "build_seconds": index.build_seconds, "parameters": index.parameters}
        write_json(self.record_path, record | extra)

    def tuned(self, wanted: float) -> dict[str, Any] | None:
        """What tuning for a fidelity found: `effort`, `refine`, `curve`, `test`; None where it was not done."""
        found: dict[str, Any] | None = self.record().get("tuned", {}).get(str(wanted))
        return found

    def remember(self, wanted: float, index: Index, curve: list[dict[str, Any]], test: Fidelity) -> None:
        """Keep what tuning found."""
        record = self.record()
        if record:
            found = {"effort": index.effort, "refine": index.refine, "curve": curve, "test": asdict(test)}
            record.setdefault("tuned", {})[str(wanted)] = found
            write_json(self.record_path, record)
