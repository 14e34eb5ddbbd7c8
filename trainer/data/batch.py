"""Collating sessions into the tensors of a step.

Letters: B sessions, T positions (the longest of the batch), F feedback rows, K feedback tasks.
Position t (from 0) is the state after t + 1 clicks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from etl.contract import CLICKED, PADDING, feedback_labels
from trainer.data.order import Int
from trainer.data.reader import Ragged, Sessions


@dataclass(frozen=True)
class FeedbackRows:
    """What was shown after a click, scored from the state after that click, before the row is seen.

    Attributes:
        session: int64 `[F]`, row of the batch.
        position: int64 `[F]`, kept clicks before the row; state `position - 1` of the session scores it.
        item: int64 `[F]`, the candidate.
        feedback: int16 `[F]`, outcome bits, bit 7 = clicked. Labels only, never a feature.
    """

    session: Int
    position: Int
    item: Int
    feedback: npt.NDArray[np.int16]

    def select(self, keep: npt.NDArray[np.bool_]) -> FeedbackRows:
        """Some of the rows."""
        return FeedbackRows(self.session[keep], self.position[keep], self.item[keep], self.feedback[keep])


@dataclass(frozen=True)
class Batch:
    """Tensors of one step on one worker; sessions are padded on the right.

    Attributes:
        items: int64 `[B, T]`, clicks that the encoder sees.
        targets: int64 `[B, T]`, the click after each; 0 where there is none to train on.
        profile: int64 `[B, 2]`.
        row_state: int64 `[F]`, index into the flattened states `[B * T]`.
        row_item: int64 `[F]`.
        row_label: float32 `[F, K]`.
    """

    items: torch.Tensor
    targets: torch.Tensor
    profile: torch.Tensor
    row_state: torch.Tensor
    row_item: torch.Tensor
    row_label: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == "cpu":
            return self
        return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))


def pad(lists: Ragged, length_N: Int, width: int) -> Int:
    """The first `length_N[i]` values of each list in a matrix `[N, width]`, padded with 0 on the right."""
    out = np.full((len(length_N), width), PADDING, np.int64)
    keep = lists.place < np.repeat(length_N, lists.lengths)
    out[lists.row[keep], lists.place[keep]] = lists.values[keep]
    return out


def feedback_rows(sessions: Sessions, *, exposures: bool) -> FeedbackRows:
    """All feedback rows of sessions: what was shown, or without exposures the kept clicks alone."""
    if exposures:
        shown = sessions.exposure_items
        position = sessions.exposure_position.values.astype(np.int64)
        rows = FeedbackRows(shown.row, position, shown.values.astype(np.int64), sessions.exposure_feedback.values)
        return rows.select(position > 0)
    clicks = sessions.items
    feedback = sessions.feedback.values.astype(np.int16) | CLICKED
    rows = FeedbackRows(clicks.row, clicks.place, clicks.values.astype(np.int64), feedback)
    return rows.select(clicks.place > 0)


def train_batch(
    sessions: Sessions, *, holdout: int, tasks: list[str], exposures: bool, rows_per_session: int, salt: int
) -> Batch:
    """The batch of a training step.

    The encoder sees clicks 1..n-1-holdout; each one's target is the click after it. A feedback row is
    trained on where its state is (position 1..n-1-holdout).

    Args:
        sessions: this worker's share; may be empty, then the batch is one session of padding.
        holdout: clicks at the end that are not trained on.
        tasks: feedback tasks, the columns of `row_label`.
        exposures: whether rows are what was shown, or the kept clicks alone.
        rows_per_session: feedback rows of a session at most, sampled.
        salt: changes the sample of rows, the same on every worker.
    """
    visible = np.maximum(sessions.items.lengths - 1 - holdout, 0)
    width = max(1, int(visible.max(initial=0)))
    items = pad(sessions.items, visible, width)
    shifted = Ragged(sessions.items.offset, np.append(sessions.items.values[1:], PADDING))
    targets = pad(shifted, visible, width)
    rows = _sampled_rows(sessions, visible, rows_per_session, salt, exposures=exposures) if tasks else None
    if len(sessions) == 0:
        items, targets = np.zeros((2, 1, 1), np.int64)
    profile = sessions.profile if len(sessions) else np.full((1, 2), -1)
    return make_batch(items, targets, profile, rows, tasks)


def make_batch(items_BT: Int, targets_BT: Int, profile_B2: Int, rows: FeedbackRows | None, tasks: list[str]) -> Batch:
    """Tensors from arrays; `rows` point at positions of `items_BT`."""
    if rows is None:
        empty = np.zeros(0, np.int64)
        rows = FeedbackRows(empty, empty, empty, empty.astype(np.int16))
    labels = [feedback_labels(rows.feedback, task) for task in tasks]
    label = np.stack(labels, axis=1) if labels else np.zeros((len(rows.item), 0))
    return Batch(
        torch.from_numpy(items_BT),
        torch.from_numpy(targets_BT),
        torch.from_numpy(np.ascontiguousarray(profile_B2)),
        torch.from_numpy(rows.session * items_BT.shape[1] + rows.position - 1),
        torch.from_numpy(rows.item),
        torch.from_numpy(label.astype(np.float32)),
    )


def _sampled_rows(sessions: Sessions, visible: Int, limit: int, salt: int, *, exposures: bool) -> FeedbackRows:
    rows = feedback_rows(sessions, exposures=exposures)
    rows = rows.select(rows.position <= visible[rows.session])
    counts = np.bincount(rows.session, minlength=len(sessions))
    if counts.max(initial=0) <= limit:
        return rows
    begin = np.concatenate([[0], np.cumsum(counts)])[:-1]
    place = np.arange(len(rows.session)) - begin[rows.session]
    # A hash of the row, not of the batch: each worker draws the rows that one worker would draw.
    key = mix(sessions.user_id[rows.session].astype(np.uint64) ^ mix(place.astype(np.uint64) + np.uint64(salt)))
    order = np.lexsort((key, rows.session))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - begin[rows.session[order]]
    return rows.select(rank < limit)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection that scatters bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
