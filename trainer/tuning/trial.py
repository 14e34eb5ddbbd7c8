"""One trial: a training run evaluated on valid, without a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.options import TRANSIENT_ERRORS, file_error
from trainer.config import load
from trainer.distributed.world import World
from trainer.loop import select
from trainer.prepare import prepared
from trainer.run.folder import CHECKPOINTS
from trainer.run.metrics_log import METRICS, read_metrics
from trainer.training.step import NotFiniteError
from trainer.tuning.space import Setting

ENDED = "trial.json"
"""Written when a trial ends: its state and cost. A trial without it is resumed."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
WAIT_SECONDS = 120.0

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: from 0.
        folder: its run folder.
        setting: the sampled options.
        options: all options of `python -m trainer`.
    """

    number: int
    folder: Path
    setting: Setting
    options: list[str]

    @property
    def state(self) -> str:
        """`finished`, `stopped`, `failed`, else `unfinished`."""
        return str(self.ended().get("state", "unfinished"))

    def ended(self) -> dict[str, Any]:
        """The content of `trial.json`; empty before the end."""
        try:
            return dict(json.loads((self.folder / ENDED).read_text()))
        except (OSError, ValueError):
            return {}

    def end(self, state: str, **more: Any) -> None:
        """Record why the trial ended. Only finished trials keep their checkpoints."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / ENDED, {"state": state, **more})
        if state != FINISHED:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def epochs(self) -> list[dict[str, Any]]:
        """Validation metrics of each epoch so far."""
        out: dict[int, dict[str, Any]] = {}
        for line in read_metrics(self.folder / METRICS):
            if line["split"] == "valid" and line["value"] is not None:
                out.setdefault(line["epoch"], {"epoch": line["epoch"]})[line["name"]] = line["value"]
        return [out[epoch] for epoch in sorted(out)]

    def run(self, report: Report) -> None:
        """Report the completed epochs, then train the others.

        Errors of this setting end the trial, not the search.

        Raises:
            InputError: a full disk, or another error of the system: the trial is unfinished and can be continued.
        """
        for metrics in self.epochs():
            report(metrics)
        if self.ended():
            return
        try:
            self._train(report)
        except OSError as error:
            raise file_error(error) from None

    def _train(self, report: Report) -> None:
        try:
            with prepared(self.options, load(self.options), wait_seconds=WAIT_SECONDS) as (config, _):
                outcome = select(config, World.alone(), report)
            self.end(FINISHED, **outcome)
        except NotFiniteError as error:
            self.end(FAILED, error=str(error))
        except InputError as error:
            if error.expected.startswith(TRANSIENT_ERRORS):
                raise
            self.end(FAILED, error=f"expected {error.expected}, got {error.got}")
