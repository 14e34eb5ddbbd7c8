"""`RunFolder`: a run folder that is local or in an object store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.object_store import WAIT_SECONDS, Mirror, local_path
from etl.runtime.output_path import os_errors_as_input_error
from trainer.distributed.world import World
from trainer.run.folder import CHECKPOINTS, SUMMARY

BUNDLES = "bundle"
"""Prefix of the names of bundles, as `CHECKPOINTS` is that of both folders of checkpoints."""


@dataclass(frozen=True)
class RunFolder:
    """A run's local folder and, if the output is a URI, its copy in an object store.

    The store is authoritative: the first worker uploads checkpoints and all other files, the others download before
    they read. For a run on a shared file system, store operations do nothing.

    Attributes:
        path: the local folder.
        mirror: the folder in the store; None = local only.
    """

    path: Path
    mirror: Mirror | None = None

    @classmethod
    def of(cls, output: str) -> RunFolder:
        """The folder of a run's `output`, a path or URI."""
        return cls(local_path(output), Mirror.for_uri(output))

    def below(self, name: str) -> RunFolder:
        """A folder inside this one."""
        return RunFolder(self.path / name, self.mirror and Mirror(f"{self.mirror.uri}/{name}", self.path / name))

    def with_name(self, name: str) -> RunFolder:
        """A folder next to this one."""
        path = self.path.with_name(name)
        return RunFolder(path, self.mirror and Mirror(f"{self.mirror.uri.rpartition('/')[0]}/{name}", path))

    @contextmanager
    def locked(self, *, wait_seconds: float = 30.0) -> Iterator[None]:
        """Hold the lock of the local folder, whose parents are made: one process of this machine writes to a run.

        Raises:
            InputError: another process still holds it after `wait_seconds`.
        """
        with os_errors_as_input_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path, wait_seconds=wait_seconds):
            yield

    def pull(self, *, checkpoints: bool) -> None:
        """Download the run from the store, except for bundles, which no worker reads."""
        if self.mirror:
            excluded = (BUNDLES,) if checkpoints else (BUNDLES, CHECKPOINTS)
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / "pulled", wait_seconds=WAIT_SECONDS):
                self.mirror.pull(lambda name: not name.startswith(excluded))

    def pull_on_all(self, world: World) -> None:
        """Download on every worker what the first one uploaded. Collective."""
        if self.mirror:
            world.barrier()
            self.pull(checkpoints=True)
            world.barrier()

    def push(self) -> None:
        """Synchronise the store with the local folder; the summary is uploaded last."""
        if self.mirror:
            self.mirror.push(last=SUMMARY)

    def push_checkpoint(self) -> None:
        """Upload the run so far. If the store is unreachable, warn: the next call retries."""
        try:
            self.push()
        except InputError as error:
            print(f"warning: the checkpoint stays on this machine: {error}", file=sys.stderr, flush=True)

    def send(self, *names: str) -> None:
        """Upload local files to the store."""
        if self.mirror:
            self.mirror.send(names)

    def collect(self, requested: Callable[[str], bool]) -> None:
        """Download the files that other workers uploaded, then empty the folder in the store."""
        if self.mirror:
            self.mirror.pull(requested)
            self.mirror.remove(list(self.mirror.listing()))

    def has(self, name: str) -> bool:
        """Whether a file exists, locally or in the store."""
        return (self.path / name).exists() or (self.mirror is not None and self.mirror.has(name))

    def remove(self, name: str) -> None:
        """Remove a file, locally and in the store."""
        (self.path / name).unlink(missing_ok=True)
        if self.mirror:
            self.mirror.remove([name])
