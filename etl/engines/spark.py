"""The Spark engine: session start-up (Java, memory, Python) and tasks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from etl.engines.java import require_java
from etl.package import package
from etl.runtime.errors import InputError
from etl.runtime.reachable import require_master
from etl.stages.task_files import Job, read_records

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from etl.config import SparkOptions  # not needed by workers

LEAST_MEMORY = 1 << 30
LOG_SETTINGS = Path(__file__).resolve().parents[1] / "conf" / "log4j2.properties"
RESULT = "number long, result string"
"""Task results: task number and JSON value."""
PARTIAL_USERS = "partition int, block_id long, users binary, rows binary"
"""`read_split.PARTIAL_SCHEMA` as a Spark schema."""


@contextlib.contextmanager
def spark_session(options: SparkOptions, scratch: Path, log_bytes: int = 0) -> Iterator[SparkSession]:
    """A Spark session with temporary files in `scratch`, stopped after the block.

    Args:
        options: Spark options; unset memory is derived from the size of the log.
        scratch: folder for temporary files.
        log_bytes: size of the log.

    Raises:
        InputError: no Java of version 17 or newer, no master at its address, or Spark does not start.
    """
    require_java()
    from pyspark.sql import SparkSession

    submitted, master = is_submitted(), options.master or "local[*]"
    on_cluster = submitted or not master.startswith("local")
    # Local workers use this interpreter; cluster machines may have theirs elsewhere.
    os.environ["PYSPARK_PYTHON"] = os.environ.get("PYSPARK_PYTHON", sys.executable) if on_cluster else sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    packages = str(Path(__file__).resolve().parents[2])  # parent of the `etl` package
    if not submitted:
        _prepare_start(master)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    builder = SparkSession.builder.appName("nextclick etl").config(map=_settings(options, scratch, log_bytes))
    if not submitted:
        builder = builder.master(master)
    already = SparkSession.getActiveSession() is not None
    session = _start(builder, master)
    session.sparkContext.setLogLevel("ERROR")
    archive = scratch / "nextclick.zip"
    sent = {Path(uri).name for uri in session.sparkContext.listFiles}
    if on_cluster and not submitted and archive.name not in sent:  # spark-submit ships --py-files itself
        package(archive)
        session.sparkContext.addPyFile(str(archive))
    try:
        yield session
    finally:
        if not already:  # do not stop a session of the caller
            session.stop()


def _prepare_start(master: str) -> None:
    """Select the Spark installation of this environment, and check what would prevent a start.

    Raises:
        InputError: invalid PYSPARK_SUBMIT_ARGS, or no master at its address.
    """
    import pyspark

    # Another installation may have another version, or be missing.
    os.environ["SPARK_HOME"] = str(Path(pyspark.__file__).parent)
    arguments = os.environ.get("PYSPARK_SUBMIT_ARGS")
    if arguments and arguments.split()[-1] != "pyspark-shell":
        raise InputError("PYSPARK_SUBMIT_ARGS that end in pyspark-shell", arguments, "unset it")
    if master.startswith("local"):
        # Spark resolves this machine's host name, which may fail.
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("SPARK_LOCAL_HOSTNAME", "localhost")
    require_master(master)


def _start(builder: Any, master: str) -> SparkSession:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        session: SparkSession = builder.getOrCreate()
    except (PySparkException, Py4JError, FileNotFoundError, PermissionError) as error:
        said = [line.strip() for line in str(error).splitlines() if "xception" in line] or str(error).splitlines()
        hint = "see above; spark.driver_memory, SPARK_CONF_DIR and PYSPARK_SUBMIT_ARGS decide how it starts"
        raise InputError(f"a Spark session on {master}", (said or [repr(error)])[0][:300], hint) from None
    return session


def is_submitted() -> bool:
    """Whether `spark-submit` started this program, and has set master and memory."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def jvm_memory(log_bytes: int, machine_bytes: int) -> str:
    """Heap size for a log: 1 GiB plus an eighth of the log, at most 8 GiB or a quarter of the machine.

    The shuffle moves about a quarter of the log and spills what does not fit, so less memory only costs
    time.
    """
    most = max(LEAST_MEMORY, min(8 << 30, machine_bytes // 4))
    return f"{min(most, LEAST_MEMORY + log_bytes // 8) >> 20}m"


def _settings(options: SparkOptions, scratch: Path, log_bytes: int) -> dict[str, bool | float | int | str | None]:
    settings: dict[str, bool | float | int | str | None] = {
        "spark.ui.showConsoleProgress": "false",
        # Fixed partitioning, since it determines the bytes of the dataset.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "16",  # a record holds many users
        # The web UI exposes the environment to unauthenticated clients.
        "spark.ui.enabled": "false",
    }
    if is_submitted():
        return settings
    if "," in str(scratch):  # Spark takes it for a list of folders
        raise InputError(
            "an output folder without a comma for engine=spark", scratch, "choose another, or engine=local"
        )
    memory = jvm_memory(log_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    settings |= {
        "spark.driver.memory": options.driver_memory or memory,
        "spark.executor.memory": options.executor_memory or memory,
        "spark.local.dir": str(scratch),
    }
    if (options.master or "local").startswith(("local", "spark://127.0.0.1")):
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    if LOG_SETTINGS.is_file():  # missing if the package was shipped as an archive
        settings["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile=file:{LOG_SETTINGS}"
    return settings


@contextlib.contextmanager
def spark_engine(job: Job, options: SparkOptions, log_bytes: int) -> Iterator[SparkEngine]:
    """A Spark session as the job's engine; stopped after the block.

    Raises:
        InputError: no Java of version 17 or newer.
    """
    with spark_session(options, Path(job.folder) / "_spark", log_bytes) as session:
        yield SparkEngine(session, job)


class SparkEngine:
    """Runs tasks on Spark; each task gets its part number."""

    def __init__(self, session: SparkSession, job: Job) -> None:
        self.session, self.job = session, job

    def map(self, task: Callable[[int], Any], n: int) -> list[Any]:
        """Run `task(0)` to `task(n - 1)`; results in this order."""
        return self._run(self._numbered(n).mapInArrow(partial(_map, task), RESULT))

    def map_reduce(
        self,
        map_split: Callable[[int], Iterator[pa.RecordBatch]],
        n: int,
        reduce_partition: Callable[[int, Iterator[pa.RecordBatch]], Any],
    ) -> list[Any]:
        """Run `map_split` over `n` splits, then `reduce_partition` over the partitions; results in partition order."""
        partial_users = self._numbered(n).mapInArrow(partial(_map_split, map_split), PARTIAL_USERS)
        by_user = partial_users.repartitionById(self.job.partitions, "partition")
        return self._run(by_user.mapInArrow(partial(_reduce, reduce_partition), RESULT))

    def _numbered(self, n: int) -> DataFrame:
        return self.session.range(0, n, 1, n)

    def _run(self, frame: DataFrame) -> list[Any]:
        """Run the tasks; results in the order of their numbers.

        Raises:
            InputError: an input error in a task, re-raised here.
            OSError: the disk is full.
        """
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        try:
            return [json.loads(row.result) for row in sorted(frame.collect(), key=lambda row: row.number)]
        except (PySparkException, Py4JError) as error:
            for record in read_records(self.job.work_folder("errors")):
                raise InputError(**record) from None
            if os.strerror(errno.ENOSPC) in str(error):  # in a task, or in Spark's temporary files
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            raise


def _numbers(batches: Iterator[pa.RecordBatch]) -> Iterator[int]:
    for batch in batches:
        yield from batch.column(0).to_pylist()


def _result(number: int, value: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([number]), pa.array([json.dumps(value)])], ["number", "result"])


def _map(task: Callable[[int], Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for number in _numbers(batches):
        yield _result(number, task(number))


def _map_split(
    map_split: Callable[[int], Iterator[pa.RecordBatch]], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for number in _numbers(batches):
        yield from map_split(number)


def _reduce(
    reduce_partition: Callable[[int, Iterator[pa.RecordBatch]], Any], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    yield _result(context.partitionId(), reduce_partition(context.partitionId(), batches))
