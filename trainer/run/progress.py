"""`Progress`: how far a training phase is, saved with each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Training progress, in plain numbers.

    Attributes:
        step: global steps taken.
        epoch: epochs completed.
        sample: samples trained on in the current epoch, over all workers.
        first_step: global steps taken when the current epoch began; None in checkpoints of earlier versions.
        loss_sums, loss_counts: of the current epoch, by task.
        score: selection metric of the epoch that ended last; -1 before the first, and of earlier versions.
        best_epoch, best_step, best_score: by the selection metric; epoch 0 before the first validation.
        worse_epochs: epochs since the best one.
        best_by_task: epoch, step and score of each feedback task's highest valid AUC, with `train.best_epoch_by_task`.
        seconds: training time, over all restarts.
        examples: target clicks trained on.
    """

    step: int = 0
    epoch: int = 0
    sample: int = 0
    first_step: int | None = None
    loss_sums: list[float] = field(default_factory=list)
    loss_counts: list[float] = field(default_factory=list)
    score: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    best_score: float = -1.0
    worse_epochs: int = 0
    best_by_task: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    seconds: float = 0.0
    examples: int = 0

    @property
    def best_steps(self) -> set[int]:
        """Steps of the best epochs: of the run, and of each task with its own."""
        return {self.best_step, *(step for _, step, _ in self.best_by_task.values())}

    def advance(self, sample: int, loss_sums: list[float], counts: list[float]) -> None:
        """Record a step: samples of the epoch done so far, the step's loss sums and counts."""
        self.step += 1
        self.sample = sample
        self.loss_sums = [a + b for a, b in zip(self.loss_sums, loss_sums, strict=True)]
        self.loss_counts = [a + b for a, b in zip(self.loss_counts, counts, strict=True)]
        self.examples += int(counts[0])

    def end_epoch(self, score: float) -> None:
        """Record the score of the epoch that has just ended, and that epoch if it is the best."""
        self.score = score
        if score > self.best_score:
            self.best_epoch, self.best_step, self.best_score = self.epoch, self.step, score
            self.worse_epochs = 0
        else:
            self.worse_epochs += 1
