"""Folders in object stores (`s3://bucket/…`), mirrored in a local folder.

Programs memory-map, rename and lock files, which object stores do not support. So datasets, bundles and runs in a store
are read from a copy in the cache folder, and outputs are built locally and then uploaded. A copy is up to date as long
as the sizes and times of its files agree with the store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pyarrow.fs as pa_fs

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file
from etl.runtime.locks import locked
from etl.runtime.output_folder import OutputFolderType, refuse_existing, refuse_unlisted, staged

CACHE = "NEXTCLICK_CACHE"
ENDPOINT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables for an endpoint other than Amazon's, as in the AWS tools."""
LOCAL = pa_fs.LocalFileSystem()
TRANSFERS = 8
WAIT_SECONDS = 3600.0
"""Timeout for another process that copies the same folder."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URI."""
    return "://" in str(path)


def absolute(path: str) -> str:
    """An absolute path; URIs are unchanged."""
    return path if is_remote(path) else str(Path(path).absolute())


def cache_folder() -> Path:
    """Folder of local copies: `NEXTCLICK_CACHE`, else `~/.cache/nextclick`."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "nextclick")


def local_path(path: str | Path) -> Path:
    """The local folder of a path: one in the cache for a URI, else the path itself."""
    if not is_remote(path):
        return Path(path)
    uri = urlsplit(str(path).rstrip("/"))
    names = [uri.scheme, uri.netloc, *PurePosixPath(uri.path).parts[1:]]
    if ".." in names:
        raise InputError("a URI without ..", path, "write it out")
    return cache_folder().joinpath(*filter(None, names))


def filesystem(uri: str) -> tuple[pa_fs.FileSystem, str]:
    """The file system of a URI or path, and the path in it.

    Raises:
        InputError: an unsupported kind of storage.
    """
    try:
        uri.encode()
        endpoint = next((os.environ[name] for name in ENDPOINT if os.environ.get(name)), None)
        if endpoint and uri.startswith("s3://") and "?" not in uri:
            server = urlsplit(endpoint)
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            store = pa_fs.S3FileSystem(endpoint_override=server.netloc, scheme=server.scheme, region=region)
            return store, uri.removeprefix("s3://").rstrip("/")
        if not is_remote(uri):
            return LOCAL, uri
        store, path = pa_fs.FileSystem.from_uri(uri)
        return store, path
    except (OSError, ValueError) as error:
        hint = "write a path, or a URI such as s3://bucket/file"
        raise InputError("storage that can be read", f"{uri}: {str(error).splitlines()[0]}", hint) from None


@contextlib.contextmanager
def _store_errors_as_input_error(uri: str) -> Iterator[None]:
    """Convert errors of a store to `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # a local error, for example a full disk
            raise
        hint = "check the address, AWS_ENDPOINT_URL and the credentials"
        raise InputError(f"storage that answers at {uri}", str(error).splitlines()[0], hint) from None


@dataclass(frozen=True)
class Mirror:
    """A folder in a store and its local copy.

    Attributes:
        uri: URI of the folder in the store.
        folder: the local folder.
    """

    uri: str
    folder: Path

    @classmethod
    def for_uri(cls, path: str | Path) -> Mirror | None:
        """The mirror of a URI; None for a local path."""
        return cls(str(path).rstrip("/"), local_path(path)) if is_remote(path) else None

    def listing(self) -> dict[str, tuple[int, int]]:
        """Size and time (in seconds) of every file in the store, by relative path.

        Raises:
            InputError: the store is unreachable, or has a name that leads out of the folder.
        """
        store, base = filesystem(self.uri)
        with _store_errors_as_input_error(self.uri):
            result = store.get_file_info(pa_fs.FileSelector(base, recursive=True, allow_not_found=True))
        listed = {}
        for info in result:
            if info.type == pa_fs.FileType.File:
                name = info.path[len(base) :].removeprefix("/")
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise InputError("names inside the folder", f"{self.uri}/{name}", "remove that object")
                if not is_hidden(name):
                    listed[name] = (info.size, info.mtime_ns // 1_000_000_000)
        return listed

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file in the store; None if it does not exist."""
        store, base = filesystem(self.uri)
        try:
            with _store_errors_as_input_error(self.uri), store.open_input_stream(f"{base}/{name}") as stream:
                data: bytes = stream.read()
                return data
        except FileNotFoundError:
            return None

    def pull(self, requested: Callable[[str], bool] = lambda _: True) -> None:
        """Synchronise the requested files of the local folder with the store; resumes an interrupted copy."""
        folder = self.folder
        listed = {name: stamp for name, stamp in self.listing().items() if requested(name)}
        local = local_files(folder)
        for name in local.keys() - listed.keys():
            if requested(name):
                (folder / name).unlink()
        store, base = filesystem(self.uri)

        def copy(name: str) -> None:
            with atomic_file(folder / name) as part:
                pa_fs.copy_files(f"{base}/{name}", str(part), source_filesystem=store, destination_filesystem=LOCAL)
                _stamp(part, listed[name])

        with _store_errors_as_input_error(self.uri):
            _each(copy, [name for name in listed if local.get(name) != listed[name]])

    def send(self, names: Iterable[str]) -> None:
        """Upload local files to the store, overwriting existing ones."""
        store, base = filesystem(self.uri)

        def copy(name: str) -> None:
            path = str(self.folder / name)
            pa_fs.copy_files(path, f"{base}/{name}", source_filesystem=LOCAL, destination_filesystem=store)

        with _store_errors_as_input_error(self.uri):
            _each(copy, names)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files from the store, if they exist."""
        store, base = filesystem(self.uri)

        def drop(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                store.delete_file(f"{base}/{name}")

        with _store_errors_as_input_error(self.uri):
            _each(drop, names)

    def has(self, name: str) -> bool:
        """Whether the store has a file."""
        store, base = filesystem(self.uri)
        with _store_errors_as_input_error(self.uri):
            return bool(store.get_file_info(f"{base}/{name}").type == pa_fs.FileType.File)

    def push(self, *, last: str | None = None) -> None:
        """Synchronise the store with the local folder; hidden files are not uploaded.

        Args:
            last: file that marks the folder as complete: removed from the store while others change.
        """
        listed, local = self.listing(), local_files(self.folder)
        differ = {name for name in listed.keys() | local.keys() if listed.get(name) != local.get(name)}
        if not differ:
            return
        ends = {last} if last else set[str]()
        self.remove(ends & listed.keys())
        self.remove(differ - local.keys() - ends)
        self.send((differ & local.keys()) - ends)
        self.send(ends & local.keys())
        now = self.listing()
        for name in (differ | ends) & local.keys():
            path = self.folder / name
            if name in now and path.is_file() and path.stat().st_size == now[name][0]:
                _stamp(path, now[name])


def is_hidden(name: str) -> bool:
    """Whether a file is temporary and local to one machine."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def local_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of a folder that is not hidden, by relative path."""
    result = {}
    for path in folder.rglob("*") if folder.is_dir() else ():
        name = path.relative_to(folder)
        if path.is_file() and not is_hidden(name.as_posix()):
            stat = path.stat()
            # Store times are whole seconds: other times mean that the file was written locally since.
            whole_seconds = stat.st_mtime_ns % 1_000_000_000 == 0
            result[name.as_posix()] = (stat.st_size, stat.st_mtime_ns // 1_000_000_000 if whole_seconds else -1)
    return result


def _stamp(path: Path, stamp: tuple[int, int]) -> None:
    os.utime(path, ns=(stamp[1] * 1_000_000_000,) * 2)


def _each(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(work, names))


def read_file(path: str | Path) -> bytes:
    """Read a small file by path or URI.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    folder, _, name = str(path).rpartition("/")
    data = Mirror(folder, local_path(folder)).read(name)
    if data is None:
        raise FileNotFoundError(path)
    return data


def download_if_remote(path: str | Path, *, last_file: str = "manifest.json") -> Path:
    """The local folder of an artefact: a path as is, a URI after downloading it.

    Args:
        path: path or URI of a dataset or bundle.
        last_file: the file that was written last.

    Raises:
        InputError: the store is unreachable, or lacks the artefact.
    """
    mirror = Mirror.for_uri(path)
    if mirror is None:
        return Path(path)
    if not mirror.has(last_file):
        raise InputError(
            f"a complete folder with {last_file}", mirror.uri, "set it to the finished output of the preceding program"
        )
    mirror.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(mirror.folder, wait_seconds=WAIT_SECONDS):
        mirror.pull()
    return mirror.folder


@contextlib.contextmanager
def staged_output(
    output: str, kind: OutputFolderType, *, overwrite: bool, inputs: Iterable[str] = ()
) -> Iterator[Path]:
    """A new folder that becomes `output`, a path or URI, if the block succeeds.

    Args:
        output: as in `output_folder.staged`; a URI is built in the cache folder and then uploaded.
        kind: kind of the output.
        overwrite: whether to replace an existing output.
        inputs: paths and URIs of the inputs.

    Raises:
        InputError: `output` may not be replaced, cannot be written, or the store is unreachable.
    """
    mirror = Mirror.for_uri(output)
    if mirror is None:
        with staged(Path(output), kind, overwrite=overwrite, inputs=inputs) as folder:
            yield folder
        return
    refuse_output(output, kind, overwrite=overwrite, inputs=inputs)
    shutil.rmtree(mirror.folder, ignore_errors=True)  # our copy: perhaps of a killed download
    with staged(mirror.folder, kind, overwrite=True) as folder:
        yield folder
    mirror.push(last=kind.last)


def refuse_output(output: str, kind: OutputFolderType, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Check that `output`, a path or URI, may be written, before work that precedes `staged_output`.

    Raises:
        InputError: an existing output may not be replaced.
    """
    mirror = Mirror.for_uri(output)
    if mirror is None:
        refuse_existing(Path(output), kind, overwrite=overwrite, inputs=inputs)
        return
    for name in inputs:
        if f"{name}/".startswith(f"{mirror.uri}/"):
            raise InputError(f"inputs outside the output {output}", name, "choose another output")
    if listed := mirror.listing():
        if not overwrite:
            raise InputError("an output folder that does not exist yet", output, "add overwrite=true")
        data = mirror.read(kind.last)
        # If an upload was killed, the complete folder is still here.
        files = kind.listed(mirror.folder) if data is None else kind.files(data)
        if files is None:
            raise InputError(f"{kind.name} to overwrite, an output of this program", output, "choose another output")
        refuse_unlisted(output, listed.keys() - files)
