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

    from etl.config import SparkOptions  # its own imports are none of the workers'

LEAST_MEMORY = 1 << 30
RESULT = "number long, result string"
"""What tasks give back: their number and a JSON value."""
PARTIAL_USERS = "partition int, part long, users binary, rows binary"
"""`combine.PARTIAL_SCHEMA` in Spark's words."""


@contextlib.contextmanager
def spark_session(options: SparkOptions, scratch: Path, log_bytes: int = 0) -> Iterator[SparkSession]:
    """A session that keeps its temporary files in `scratch` and ends with the block.

    Args:
        options: how Spark runs; memory that they leave open follows from the size of the log.
        scratch: folder for temporary files.
        log_bytes: size of the log.

    Raises:
        InputError: no Java of version 17 or newer, no master at its address, or a Spark that does not start.
    """
    require_java()
    from pyspark.sql import SparkSession

    submitted, master = is_submitted(), options.master or "local[*]"
    elsewhere = submitted or not master.startswith("local")
    # Workers here run this very interpreter; machines of a cluster may have theirs elsewhere.
    os.environ["PYSPARK_PYTHON"] = os.environ.get("PYSPARK_PYTHON", sys.executable) if elsewhere else sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    packages = str(Path(__file__).resolve().parents[2])  # where `etl` lies: its own modules are no top-level ones
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
    if elsewhere and not submitted and archive.name not in sent:  # spark-submit ships what --py-files names
        package(archive)
        session.sparkContext.addPyFile(str(archive))
    try:
        yield session
    finally:
        if not already:  # a caller's session is the caller's to end
            session.stop()


def _prepare_start(master: str) -> None:
    """See to it that the JVM is the one of this environment, and find out what would keep it from starting.

    Raises:
        InputError: PYSPARK_SUBMIT_ARGS that start no session, or no master at its address.
    """
    import pyspark

    # One of another installation is of another version, or not there.
    os.environ["SPARK_HOME"] = str(Path(pyspark.__file__).parent)
    arguments = os.environ.get("PYSPARK_SUBMIT_ARGS")
    if arguments and arguments.split()[-1] != "pyspark-shell":
        raise InputError("PYSPARK_SUBMIT_ARGS that end in pyspark-shell", arguments, "unset it")
    if master.startswith("local"):
        # Spark asks for the address of this machine's name, which need not have one.
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
    """Whether `spark-submit` started this program: then master and memory are those it was given."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def jvm_memory(log_bytes: int, machine_bytes: int) -> str:
    """Heap for a log: 1 GiB and an eighth of the log, 8 GiB or a quarter of the machine at most.

    The shuffle carries about a quarter of the log and spills what does not fit: more memory saves disk
    traffic, less costs time only.
    """
    most = max(LEAST_MEMORY, min(8 << 30, machine_bytes // 4))
    return f"{min(most, LEAST_MEMORY + log_bytes // 8) >> 20}m"


def _settings(options: SparkOptions, scratch: Path, log_bytes: int) -> dict[str, bool | float | int | str | None]:
    settings: dict[str, bool | float | int | str | None] = {
        "spark.ui.showConsoleProgress": "false",
        # The partitions are ours to choose: the bytes of the dataset follow from them.
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "16",  # a record holds many users
        # Pages of an application let whoever reaches them read its environment.
        "spark.ui.enabled": "false",
    }
    if is_submitted():
        return settings
    memory = jvm_memory(log_bytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    settings |= {
        "spark.driver.memory": options.driver_memory or memory,
        "spark.executor.memory": options.executor_memory or memory,
        "spark.local.dir": str(scratch),
    }
    if (options.master or "local").startswith(("local", "spark://127.0.0.1")):
        settings |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    logging = Path(__file__).resolve().parent / "conf" / "log4j2.properties"
    if logging.is_file():  # not inside a package that was shipped as an archive
        settings["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile=file:{logging}"
    return settings


@contextlib.contextmanager
def spark_engine(job: Job, options: SparkOptions, log_bytes: int) -> Iterator[SparkEngine]:
    """A Spark session as the job's engine; it ends with the block.

    Raises:
        InputError: no Java of version 17 or newer.
    """
    with spark_session(options, Path(job.folder) / "_spark", log_bytes) as session:
        yield SparkEngine(session, job)


class SparkEngine:
    """Runs tasks as Spark's: the number of its part tells a task what to do."""

    def __init__(self, session: SparkSession, job: Job) -> None:
        self.session, self.job = session, job

    def map(self, task: Callable[[int], Any], n: int) -> list[Any]:
        """`task(0)` to `task(n - 1)`, results in this order."""
        return self._run(self._numbered(n).mapInArrow(partial(_map, task), RESULT))

    def shuffle(
        self,
        combine: Callable[[int], Iterator[pa.RecordBatch]],
        n: int,
        gather: Callable[[int, Iterator[pa.RecordBatch]], Any],
    ) -> list[Any]:
        """`combine` over `n` splits, then `gather` over the job's partitions, results in their order."""
        partial_users = self._numbered(n).mapInArrow(partial(_combine, combine), PARTIAL_USERS)
        by_user = partial_users.repartitionById(self.job.partitions, "partition")
        return self._run(by_user.mapInArrow(partial(_gather, gather), RESULT))

    def _numbered(self, n: int) -> DataFrame:
        return self.session.range(0, n, 1, n)

    def _run(self, frame: DataFrame) -> list[Any]:
        """Results of the tasks in the order of their numbers.

        Raises:
            InputError: an error of the input in a task, raised as if it had occurred here.
            OSError: a task met a full disk.
        """
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        try:
            return [json.loads(row.result) for row in sorted(frame.collect(), key=lambda row: row.number)]
        except (PySparkException, Py4JError) as error:
            for record in read_records(self.job.work_folder("errors")):
                raise InputError(**record) from None
            if os.strerror(errno.ENOSPC) in str(error):  # a task's, or Spark's own temporary files
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


def _combine(
    combine: Callable[[int], Iterator[pa.RecordBatch]], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for number in _numbers(batches):
        yield from combine(number)


def _gather(
    gather: Callable[[int, Iterator[pa.RecordBatch]], Any], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    yield _result(context.partitionId(), gather(context.partitionId(), batches))
