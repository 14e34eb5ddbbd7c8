"""`RunFolder`: a run folder that is local or in an object store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.object_store import WAIT_SECONDS, Mirror, local_path
from trainer.distributed.world import World
from trainer.run.folder import SUMMARY

BUNDLES, CHECKPOINTS = "bundle", "checkpoints"
"""How the names of their folders begin."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder on this machine and, where the output is a URI, in an object store.

    The store holds the truth: the first worker sends checkpoints and all else, the others copy what it sent before
    they read it. All that concerns the store does nothing for a run on a file system, which all workers share.

    Attributes:
        path: of the folder on this machine.
        mirror: the folder in the store; None without one.
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

    def pull(self, *, checkpoints: bool) -> None:
        """Copy the run from the store, except for bundles, which no worker reads."""
        if self.mirror:
            excluded = (BUNDLES,) if checkpoints else (BUNDLES, CHECKPOINTS)
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / "pulled", wait_seconds=WAIT_SECONDS):
                self.mirror.pull(lambda name: not name.startswith(excluded))

    def pull_on_all(self, world: World) -> None:
        """On every worker, copy what the first one sent."""
        if self.mirror:
            world.barrier()
            self.pull(checkpoints=True)
            world.barrier()

    def push(self) -> None:
        """Make the folder in the store that of this machine; the summary goes last."""
        if self.mirror:
            self.mirror.push(last=SUMMARY)

    def push_checkpoint(self) -> None:
        """Send what the run has so far. An unreachable store costs a warning: the next call sends this too."""
        try:
            self.push()
        except InputError as error:
            print(f"warning: the checkpoint stays on this machine: {error}", file=sys.stderr, flush=True)

    def send(self, *names: str) -> None:
        """Copy files of this machine to the store."""
        if self.mirror:
            self.mirror.send(names)

    def collect(self, requested: Callable[[str], bool]) -> None:
        """Move files that other workers sent from the store to this machine; the store has none of the folder then."""
        if self.mirror:
            self.mirror.pull(requested)
            self.mirror.remove(list(self.mirror.listing()))

    def has(self, name: str) -> bool:
        """Whether a file exists, on this machine or in the store."""
        return (self.path / name).exists() or (self.mirror is not None and self.mirror.has(name))

    def remove(self, name: str) -> None:
        """Remove a file, on this machine and in the store."""
        (self.path / name).unlink(missing_ok=True)
        if self.mirror:
            self.mirror.remove([name])
