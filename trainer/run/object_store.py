"""A run whose folder lies in an object store: what each machine has of it, and when it is sent.

The store holds the truth. The first worker sends checkpoints and all else; the others take what it sent before they
read it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.object_store import WAIT_SECONDS, Mirror
from trainer.distributed.world import World
from trainer.run.folder import SUMMARY

BUNDLES, CHECKPOINTS = "bundle", "checkpoints"
"""How the names of their folders begin."""


def pull_run(mirror: Mirror, *, checkpoints: bool) -> None:
    """Make the run's folder here that of the store, but for bundles, which no worker reads."""
    left_out = (BUNDLES,) if checkpoints else (BUNDLES, CHECKPOINTS)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    with locked(mirror.folder / "pulled", wait_seconds=WAIT_SECONDS):
        mirror.pull(lambda name: not name.startswith(left_out))


def pull_by_all(mirror: Mirror | None, world: World) -> None:
    """Every machine takes what the first worker sent."""
    if mirror:
        world.barrier()
        pull_run(mirror, checkpoints=True)
        world.barrier()


def send_checkpoint(mirror: Mirror | None) -> None:
    """Send what the run has so far. A store that does not answer costs a warning: the next time sends this too."""
    try:
        if mirror:
            mirror.push(last=SUMMARY)
    except InputError as error:
        print(f"warning: the checkpoint stays on this machine: {error}", file=sys.stderr, flush=True)


def bundle_part_mirror(mirror: Mirror | None, building: Path) -> Mirror | None:
    """Where workers of other machines hand in their files of a bundle under construction."""
    return Mirror(f"{mirror.uri}/{building.name}", building) if mirror else None
