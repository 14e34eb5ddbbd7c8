"""Collates sessions into the tensors of a training step.

Letters: B sessions, T positions (the longest of the batch), F feedback rows, K feedback tasks.
Position t (from 0) is the state after t + 1 clicks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from etl.dataset import CLICKED, PADDING, feedback_labels
from etl.runtime.arrays import IntArray
from trainer.data.hashing import sample_per_group
from trainer.data.ragged import Ragged, cumcount
from trainer.data.reader import Sessions


@dataclass(frozen=True)
class FeedbackRows:
    """Items shown after a click, scored from the state after that click, before their own outcome is seen.

    Attributes:
        session: int64 `[F]`, row of the batch.
        position: int64 `[F]`, number of retained clicks before the row; the row is scored from state `position - 1`.
        item: int64 `[F]`, the candidate.
        feedback: int16 `[F]`, outcome bits, bit 7 = clicked. Labels only, never a feature.
        index_in_session: int64 `[F]`, the row's index among all rows of its session.
    """

    session: IntArray
    position: IntArray
    item: IntArray
    feedback: npt.NDArray[np.int16]
    index_in_session: IntArray

    def select(self, keep: npt.NDArray[np.bool_]) -> FeedbackRows:
        """Some of the rows."""
        return FeedbackRows(*(values[keep] for values in vars(self).values()))


EMPTY = torch.zeros(0, dtype=torch.long)
ACTION_BITS = 5
"""Number of action bits: bits 0 to 4 of a click's feedback."""
MAX_ENTERED = 3
"""Visit counts are capped at this number."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one step on one worker; sessions are padded on the right.

    Attributes:
        items: int64 `[B, T]`, the encoder's input clicks.
        targets: int64 `[B, T]`, the next click at each position; 0 = not trained on.
        profile: int64 `[B, 2]`.
        row_state: int64 `[F]`, index into the flattened states `[B * T]`, of a position with a target.
        row_item: int64 `[F]`.
        row_label: float32 `[F, K]`.
        skipped_state, skipped_item, skipped_slot: int64 `[S]`, items shown with a target and not clicked;
            slots count from 0 for each state.
        positives: int64 `[P]`, the targets of all workers, where they are used as in-batch negatives.
        actions: int64 `[B, T]`, action codes of `items`, where the model reads them.
    """

    items: torch.Tensor
    targets: torch.Tensor
    profile: torch.Tensor
    row_state: torch.Tensor
    row_item: torch.Tensor
    row_label: torch.Tensor
    skipped_state: torch.Tensor = EMPTY
    skipped_item: torch.Tensor = EMPTY
    skipped_slot: torch.Tensor = EMPTY
    positives: torch.Tensor = EMPTY
    actions: torch.Tensor = EMPTY

    def describe(self) -> str:
        """A short description that identifies the batch in error messages."""
        return f"{len(self.items)} sessions here, items {self.items[0].tolist()[:8]} …"

    def to(self, device: torch.device) -> Batch:
        """Move the batch to a device."""
        if device.type == "cpu":
            return self
        return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))


def pad(lists: Ragged, length_N: IntArray, width: int) -> IntArray:
    """Right-pad the first `length_N[i]` values of each list with 0 to `[N, width]`."""
    out = np.full((len(length_N), width), PADDING, np.int64)
    keep = lists.index_in_row < np.repeat(length_N, lists.lengths)
    out[lists.row[keep], lists.index_in_row[keep]] = lists.values[keep]
    return out


def action_codes(sessions: Sessions, length_N: IntArray, width: int) -> IntArray:
    """Action codes of the first `length_N[i]` clicks of each session, `[N, width]`; 0 for padding.

    The lowest bits hold a click's actions, the bits above its visit count. They are outcomes of that click, so they may
    only be used to predict what comes after it.
    """
    actions = sessions.feedback.values.astype(np.int64) & ((1 << ACTION_BITS) - 1)
    entered = np.clip(sessions.watching_times.values.astype(np.int64), 0, MAX_ENTERED)
    return pad(Ragged(sessions.items.offset, actions | entered << ACTION_BITS), length_N, width)


def feedback_rows(sessions: Sessions, *, exposures: bool) -> FeedbackRows:
    """All feedback rows of sessions: the exposures, or without `exposures` the retained clicks only."""
    if exposures:
        shown = sessions.exposure_items
        position = sessions.exposure_position.values.astype(np.int64)
        item, feedback = shown.values.astype(np.int64), sessions.exposure_feedback.values
        rows = FeedbackRows(shown.row, position, item, feedback, shown.index_in_row)
        return rows.select(position > 0)
    clicks = sessions.items
    feedback = sessions.feedback.values.astype(np.int16) | CLICKED
    rows = FeedbackRows(clicks.row, clicks.index_in_row, clicks.values.astype(np.int64), feedback, clicks.index_in_row)
    return rows.select(clicks.index_in_row > 0)


@dataclass(frozen=True)
class BatchOptions:
    """How training batches are built.

    Attributes:
        holdout: number of final clicks of a session that are not trained on.
        tasks: feedback tasks, the columns of `row_label`.
        exposures: whether rows are the exposures, or the retained clicks only.
        rows_per_session: maximum feedback rows per session, sampled.
        salt: seed of the samples, the same on every worker.
        prefixes: maximum target clicks per session, sampled; 0 = all.
        skipped: maximum shown but not clicked items per target, sampled.
        actions: whether the model reads the actions on past clicks.
    """

    holdout: int
    tasks: list[str]
    exposures: bool
    rows_per_session: int
    salt: int
    prefixes: int = 0
    skipped: int = 0
    actions: bool = False


def train_batch(sessions: Sessions, options: BatchOptions, positives: IntArray | None = None) -> Batch:
    """Build the batch of a training step.

    The encoder reads clicks 1..n-1-holdout; the target of each is the next click. This trains every prefix
    of the session at once (prefix augmentation, Tan et al. 2016). A feedback row is trained on if its state
    has a target (position 1..n-1-holdout).

    Args:
        sessions: this worker's share; if empty, the batch is one session of padding.
        options: how the batch is built.
        positives: targets of all workers, for in-batch negatives.
    """
    visible = np.maximum(sessions.items.lengths - 1 - options.holdout, 0)
    width = max(1, int(visible.max(initial=0)))
    items = pad(sessions.items, visible, width)
    shifted = Ragged(sessions.items.offset, np.append(sessions.items.values[1:], PADDING))
    targets = pad(shifted, visible, width)
    if options.prefixes:
        row, index = np.nonzero(targets)
        sampled = sample_per_group(sessions.user_id[row], row, index, options.prefixes, options.salt)
        targets[row[~sampled], index[~sampled]] = PADDING
    rows = None
    if options.tasks and len(sessions):
        rows = feedback_rows(sessions, exposures=options.exposures)
        rows = rows.select(_has_target(rows, visible, targets))
        user = sessions.user_id[rows.session]
        rows = rows.select(
            sample_per_group(user, rows.session, rows.index_in_session, options.rows_per_session, options.salt)
        )
    more = _skipped(sessions, visible, targets, options) if options.skipped and len(sessions) else {}
    if options.actions:
        more["actions"] = action_codes(sessions, visible, width)
    if len(sessions) == 0:
        items, targets = np.zeros((2, 1, 1), np.int64)
        more |= {"actions": items} if options.actions else {}
    profile = sessions.profile if len(sessions) else np.full((1, 2), -1)
    batch = make_batch(items, targets, profile, rows, options.tasks)
    if positives is not None:
        more["positives"] = positives
    return replace(batch, **{name: torch.from_numpy(values) for name, values in more.items()})


def targets_of(sessions: Sessions, holdout: int) -> IntArray:
    """All target clicks of sessions, concatenated."""
    items = sessions.items
    trained = (items.index_in_row > 0) & (items.index_in_row < np.repeat(items.lengths - holdout, items.lengths))
    return items.values[trained].astype(np.int64)


def _has_target(rows: FeedbackRows, visible: IntArray, targets_BT: IntArray) -> npt.NDArray[np.bool_]:
    state = np.minimum(rows.position, visible[rows.session]) - 1
    return (rows.position <= visible[rows.session]) & (targets_BT[rows.session, state] != PADDING)


def _skipped(sessions: Sessions, visible: IntArray, targets_BT: IntArray, options: BatchOptions) -> dict[str, IntArray]:
    """The skipped-item fields of `Batch`."""
    rows = feedback_rows(sessions, exposures=True)
    rows = rows.select(((rows.feedback & CLICKED) == 0) & _has_target(rows, visible, targets_BT))
    state = rows.session * targets_BT.shape[1] + rows.position - 1
    chosen = sample_per_group(
        sessions.user_id[rows.session], state, rows.index_in_session, options.skipped, options.salt + 1
    )
    return {"skipped_state": state[chosen], "skipped_item": rows.item[chosen], "skipped_slot": cumcount(state[chosen])}


def make_batch(
    items_BT: IntArray, targets_BT: IntArray, profile_B2: IntArray, rows: FeedbackRows | None, tasks: list[str]
) -> Batch:
    """Build a batch from arrays; `rows` refer to positions of `items_BT`."""
    if rows is None:
        empty = np.zeros(0, np.int64)
        rows = FeedbackRows(empty, empty, empty, empty.astype(np.int16), empty)
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
