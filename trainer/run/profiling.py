"""Profiling of training steps with torch's profiler."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, supported_activities

WARM_STEPS = 10
"""Warm-up steps before the profiled ones: the first steps allocate memory that later ones reuse."""
STEPS = 20
TRACE, TABLE = "trace.json", "table.txt"


class Profiler:
    """Profiles some steps of an epoch and writes the results.

    Args:
        run: the run folder; `profile/trace.json` opens in a browser's trace viewer, `profile/table.txt` lists
            operators by self time.
        enabled: whether to profile at all.
    """

    def __init__(self, run: Path, *, enabled: bool) -> None:
        self.folder, self.left = run / "profile", STEPS if enabled else 0
        self.running: profile | None = None

    def before(self, step: int) -> None:
        """Called before each step of the epoch, counted from 0."""
        if self.running:
            self.left -= 1
            if not self.left:
                self.finish()
        elif self.left and step >= WARM_STEPS:
            self.running = profile(activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA})
            self.running.start()

    def finish(self) -> None:
        """Write the profile, even if the epoch had fewer steps."""
        if not self.running:
            return
        profiler, self.running = self.running, None
        profiler.stop()
        self.folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=48)
        (self.folder / TABLE).write_text(f"{STEPS - self.left} steps\n{table}\n")
