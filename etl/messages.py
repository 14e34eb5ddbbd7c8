"""Messages of the sessions job: summary, quarantined and dropped rows, reasons for an empty dataset."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from etl.dataset import QUARANTINE_FOLDER
from etl.runtime.errors import InputError
from etl.stages.task_files import Job, read_records

QUARANTINE = f"{QUARANTINE_FOLDER}/rows.jsonl"


def refuse_empty(job: Job) -> None:
    """Check that at least one user has a session (scenario `ctr`: that a row is clicked).

    Raises:
        InputError: there is none; reports how many clicks users have, and which rows could not be read.
    """
    if any(cut["sessions"] for cut in read_records(job.work_folder("cut"))):
        return
    splits = read_records(job.work_folder("splits"))
    paths = sorted(job.work_folder("raw_clicks_per_user").glob("*.npy"))
    clicks_users = np.concatenate([np.load(path) for path in paths])
    reasons = sum((Counter(split["reasons"]) for split in splits), Counter[str]())
    rows = sum(split["counts"].get("exposures", 0) for split in splits)
    users, most = int(clicks_users[:, 1].sum()), int(clicks_users[:, 0].max(initial=0))
    got = [f"none among {users:,} users of {rows:,} rows, who have {most:,} clicks at most"]
    if reasons:
        got.append(f"{reasons.total():,} rows could not be read: {_listed(reasons)}")
    if unknown := sum(split["unknown"] for split in splits):
        got.append(f"{unknown:,} rows are of items that items_from lacks")
    if others := sum(split["of_other_users"] for split in splits):
        got.append(f"{others:,} rows are of users that users_from lacks")
    if job.scenario.history:
        raise InputError("a clicked row", "; ".join(got), "check the column click")
    if job.min_item_clicks > 1:
        got.append(f"rows of items with fewer than protocol.min_item_clicks={job.min_item_clicks} clicks are dropped")
    if job.max_item_clicks is not None:
        got.append(f"rows of items with more than protocol.max_item_clicks={job.max_item_clicks} clicks are dropped")
    expected = f"a user with protocol.min_clicks={job.min_clicks} clicks that the protocol keeps"
    raise InputError(expected, "; ".join(got), "lower protocol.min_clicks, or check the input")


def warnings(statistics: dict[str, Any], output: str) -> list[str]:
    """One line for each kind of loss in the statistics of a dataset.

    Args:
        statistics: content of `statistics.json`.
        output: path of the dataset, for the path of the quarantined rows.
    """
    lines = []
    rows, quarantined = statistics["rows_read"], Counter(statistics["rows_quarantined"])
    if absent := statistics["absent_columns"]:
        lines.append(f"the input has no column {', '.join(absent)}: read as null")
    if unknown := statistics["rows_of_unknown_items"]:
        lines.append(f"{unknown:,} of {rows:,} rows ({unknown / rows:.2%}) are of items that items_from lacks: dropped")
    if bad := quarantined.total():
        where = f"{output.rstrip('/')}/{QUARANTINE}"
        share = f"{bad:,} of {rows:,} rows ({bad / rows:.2%})"
        lines.append(f"{share} could not be read: {_listed(quarantined)}; some are in {where}")
    return [f"warning: {line}" for line in lines]


def summary(statistics: dict[str, Any], seconds: float) -> str:
    """One summary line for the user."""
    raw, kept = statistics["raw"], statistics["kept"]
    return (
        f"{statistics['rows_read']:,} rows of {raw['users']:,} users → {kept['users']:,} sessions, "
        f"{kept['clicks']:,} clicks, {kept['items']:,} items in {seconds:.1f} s"
    )


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common())
