"""Atomic output files."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from etl.runtime.errors import InputError


@contextlib.contextmanager
def new_file(output: str) -> Iterator[Path]:
    """A temporary path that becomes the file `output` if the block succeeds.

    Raises:
        InputError: a URI, a folder, a path that cannot be written, or a full disk.
    """
    if "://" in output:
        raise InputError("a path for output, as this program writes no URIs", output, "write a file here and copy it")
    path = Path(output).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            raise InputError("an output file", f"the {'folder' if path.is_dir() else 'device'} {path}", "name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.filename and Path(error.filename) not in (temporary, path, *path.parents):
            raise  # an error of an input file
        got = f"{path}: {error.strerror or error}"
        raise InputError("an output file that can be written", got, "check the folder and its free space") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_log(output: str) -> Iterator[IO[bytes]]:
    """A stream that becomes the CSV file `output`, compressed if its name ends in `.gz`.

    Raises:
        InputError: as in `new_file`; an unsupported compression.
    """
    if output.lower().endswith((".zip", ".xz", ".bz2", ".zst", ".lz4")):
        raise InputError("an output that ends in .csv or .csv.gz", output, "compress it afterwards")
    with new_file(output) as path, path.open("wb") as raw, contextlib.ExitStack() as stack:
        if output.lower().endswith(".gz"):  # without time and name, for reproducible bytes
            yield cast(IO[bytes], stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)))
        else:
            yield raw
