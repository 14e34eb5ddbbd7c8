"""Tests, training rates and share of peak on a GPU, against the CPU of the same machine; without a GPU the CPU only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import torch

from tests.benchmarks.rates import CPU, SIZES, events_per_second, finish, timed

FULL = 3_753_436
"""Items of the QK-video log."""
LENGTH = 30
TEST_SECONDS = 300
"""Time limit of the tests."""


def gpu(n_items: int = FULL, sessions: int = 512, many: int = 8192) -> None:
    """Central tests on the GPU, then rates of both models on the CPU and the GPU; five minutes for each of the two.

    Args:
        n_items: items of the table.
        sessions: sessions per step, of 30 target clicks each, as in the benchmark `train`.
        many: sessions of a larger second step on the GPU, which the first size does not fill.
    """
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in training
    runs = [(CPU, "float32", sessions)]
    if torch.cuda.is_available():
        device = torch.device("cuda")
        print(f"GPU: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
        print(f"tests: {tests_on_gpu()}", flush=True)
        runs += [(device, precision, size) for size in (sessions, many) for precision in ("float32", "bfloat16")]
    else:
        print("no GPU is usable here: no test of one is run, and the rates are those of the CPU alone")
    print(f"{n_items:,} items, dimension 64, 2,048 negatives, sessions of {LENGTH} target clicks; CPU: {cores} cores")
    print("share of peak: 3 × FLOPs of a forward pass, over those of a large square matrix product")
    print("| device | precision | sessions | model | events/s | TFLOP/s | peak, TFLOP/s | share | against the CPU |")
    print("|---|---|---|---|---|---|---|---|---|")
    on_cpu, peaks = {}, {}
    for device, precision, size in runs:
        if (device, precision) not in peaks:
            peaks[device, precision] = matrix_peak(device, precision)
        for model in SIZES:
            try:
                rate, flops = events_per_second(model, n_items, size * LENGTH, LENGTH, device, precision)
            except RuntimeError as error:  # print the other rows all the same
                print(
                    f"| {device} | {precision} | {size:,} | {model} | {str(error).splitlines()[0]} | | | | |",
                    flush=True,
                )
                continue
            peak, reference = peaks[device, precision], on_cpu.setdefault(model, rate)
            print(
                f"| {device} | {precision} | {size:,} | {model} | {rate:,.0f} | {flops / 1e12:.3f} | {peak / 1e12:.2f} "
                f"| {flops / peak:.1%} | {rate / reference:.1f} × |",
                flush=True,
            )


def matrix_peak(device: torch.device, precision: str) -> float:
    """FLOPs per second of a square matrix product that is large for its device."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))

    def work() -> None:
        for _ in range(4):
            a @ b
        finish(device)

    return 4 * 2 * side**3 / timed(work, 3)


def tests_on_gpu() -> str:
    """The last line of the tests marked `gpu`, preceded by those that failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/trainer", "--durations=0", "-p", "no:cacheprovider"]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=os.environ | {"NEXTCLICK_GPU": "1"}, capture_output=True, text=True, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not through after {TEST_SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = [line for line in done.stdout.splitlines() if re.match(r"\d+ (passed|failed|skipped|error)", line)]
    message = last[-1] if last else f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
    return "\n".join([*lines, f"{message} ({time.perf_counter() - begin:.0f} s with their start)"])
