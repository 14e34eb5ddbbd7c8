"""`python -m etl.movielens output=FILE.csv`: MovieLens-100K as a `qb_video` log.

Every rating is a click in time order (ties by item id); like = rating of 4 or 5, share = rating of
5, follow = 0. So share is a subset of like and there are no unclicked exposures: it is real data for
testing the programs, but not suited for multi-task experiments.

The data (GroupLens, Harper and Konstan 2015) is taken from the `recbole` wheel on PyPI.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.files import sha256_of
from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_file, new_log

WHEEL = "recbole==1.2.1"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k"
AGE_BOUNDS = (18, 25, 35, 45, 50, 56)
"""Age bucket = number of bounds not above the age (the groups of MovieLens-1M)."""
LIKED, SHARED = 4.0, 5.0


@dataclass
class MovielensConfig:
    """Options of `python -m etl.movielens`."""

    output: str = option(MISSING, "CSV file to write (.gz compresses it)")
    wheel: str | None = option(None, "the recbole 1.2.1 wheel, if it is already here")
    cache: str = option("~/.cache/nextclick", "folder that keeps the downloaded wheel")


def fetch_wheel(cache: Path) -> Path:
    """The wheel from the cache, else from PyPI; `to_csv` checks its hash.

    Raises:
        InputError: it cannot be downloaded.
    """
    cached = next(iter(sorted(cache.glob("recbole-1.2.1-*.whl"))), None)
    if cached is None:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, WHEEL]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            loaded = next(iter(Path(folder).glob("*.whl")), None)
            if done.returncode or loaded is None:
                message = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise InputError(f"{WHEEL} from PyPI", message, "go online, or give wheel=FILE")
            cached = loaded.replace(cache / loaded.name)
    return cached


def to_csv(wheel: Path) -> str:
    """The log as CSV text in Tenrec's `qb_video` format, sorted by user id.

    Raises:
        InputError: not the expected wheel.
    """
    from etl.logs.tenrec import NULL, VIDEO

    if not wheel.is_file() or sha256_of(wheel) != WHEEL_SHA256:
        raise InputError(f"the {WHEEL} wheel with its known SHA-256", wheel, "remove it to download it again")
    with zipfile.ZipFile(wheel) as archive:
        users = {r[0]: r for r in _rows(archive, "user")}
        genres = {r[0]: r[3].split(" ")[0] or NULL for r in _rows(archive, "item")}
        ratings = [(int(u), float(t), int(i), float(r)) for u, i, r, t in _rows(archive, "inter")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(VIDEO)
    for user, _, item, rating in sorted(ratings):
        _, age, gender, *_ = users[str(user)]
        like, share = int(rating >= LIKED), int(rating >= SHARED)
        bucket = sum(int(age) >= bound for bound in AGE_BOUNDS)
        row = [user, item, 1, 0, like, share, genres[str(item)], 1, {"M": 1, "F": 2}.get(gender, 0), bucket]
        writer.writerow(row)
    return out.getvalue()


def titles(wheel: Path) -> str:
    """Film titles with years, in the `.tsv` format of `titles=FILE` of `python -m retrieval`."""
    with zipfile.ZipFile(wheel) as archive:
        lines = [f"{item}\t{title} ({year})" for item, title, year, *_ in _rows(archive, "item")]
    return "\n".join(["item_id\ttitle", *lines]) + "\n"


def titles_path(log: str) -> str:
    """Path of a log's titles file: next to it, and not matched by `*.csv`."""
    return f"{log.removesuffix('.gz').removesuffix('.csv')}.titles.tsv"


def _rows(archive: zipfile.ZipFile, kind: str) -> list[list[str]]:
    lines = archive.read(f"{INSIDE}.{kind}").decode("utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]


def job(options: list[str]) -> None:
    """Write the log and its titles."""
    config = read_options(MovielensConfig, None, options)
    wheel = Path(config.wheel) if config.wheel else fetch_wheel(Path(config.cache).expanduser())
    text = to_csv(wheel)
    with new_log(config.output) as stream:
        stream.write(text.encode())
    with new_file(titles_path(config.output)) as path:
        path.write_text(titles(wheel))
    print(f"{text.count(chr(10)) - 1:,} ratings: {config.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.movielens", MovielensConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
