"""`python -m etl` and related programs from the command line: help, invalid input, MovieLens."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyspark
import pytest

from cluster.config import load as load_cluster
from etl.__main__ import main
from etl.config import SCENARIOS, SparkOptions, load
from etl.engines import spark
from etl.logs import tenrec
from etl.movielens import to_csv
from etl.runtime.errors import InputError
from etl.runtime.options import run_program
from retrieval.config import load as load_retrieval
from tests.etl.test_ctr_rows import ctr_log
from tests.etl.test_java import java_home
from tests.support.engine import write_log
from trainer.config import load as load_trainer


def good(tmp_path):
    rows = [(1, i, 1, 0, 0, 0, "c", 1, 1, 1) for i in range(12)]
    return [f"input={write_log(tmp_path / 'log.csv', rows)}", f"output={tmp_path / 'out'}", "scenario=qb_video"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["users_from="], "users_from=FILE or users_from=[FILE,…]"),
        (["items_from="], "items_from=DATASET, got an empty value"),
        (["input=caf\udce9.csv"], "storage that can be read"),
        (["protocol.min_clicks=2"], "protocol.min_clicks of at least 3, got 2"),
        (["protocol.max_clicks=2"], "protocol.max_clicks of at least 3 and at most 1000, got 2"),
        (["protocol.max_clicks=1001"], "protocol.max_clicks of at least 3 and at most 1000, got 1001"),
        (["protocol.min_clicks=many"], "an integer for protocol.min_clicks, got 'many'"),
        (["protocol.dedupe=some"], "protocol.dedupe one of none, exact, first, got some"),
        (["protocol=nonsense"], "expected protocol one of cold_start, study, tenrec_code, got nonsense (choose"),
        (["scenario=tiktok"], "scenario one of qk_video"),
        (["input=/no/such.csv"], "an input file, got /no/such.csv"),
        (["input=/no/such*.csv"], "files that match the input"),
        (["input=[]"], "input=FILE or input=[FILE,…]"),
        (["input=7"], "input=FILE or input=[FILE,…]"),
        (["colour=red"], "a known option, got colour"),
        (["min_clicks=3"], "did you mean protocol.min_clicks?"),
        (["exposures=perhaps"], "true or false for exposures"),
        (["shards=0"], "shards of at least 1"),
        (["split_bytes=2147483648"], "split_bytes of at least 1 and at most 268435456"),
        (["processes=0"], "processes of at least 1"),
        (["engine=flink"], "engine one of auto, local, spark, got flink"),
        (["engine=local", 'spark.master="local[1]"'], "no option of spark with engine=local"),
        (["spark.master=moon"], "spark.master as local[N], spark://HOST:PORT or k8s://URL, got moon"),
        (['spark.master="local[x]"'], "spark.master as local[N]"),
        (["spark.driver_memory=lots"], "spark.driver_memory of at least 512m, got lots"),
        (["spark.executor_memory=100m"], "spark.executor_memory of at least 512m, got 100m"),
        (["items_from=/nowhere"], "a dataset folder with manifest.json"),
        (["justaword"], "options as key=value"),
        (["protocol.min_clicks"], "options as key=value, got protocol.min_clicks (write protocol.min_clicks=VALUE)"),
        (
            ["protocol.min_item_clicks=50"],
            "rows of items with fewer than protocol.min_item_clicks=50 clicks are dropped",
        ),
    ],
)
def test_invalid_options_fail_with_a_one_line_error_and_write_nothing(tmp_path, wrong, message, capfd):
    assert main([*good(tmp_path), *wrong]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: expected ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


@pytest.mark.parametrize("missing", ["input", "output", "scenario"])
def test_missing_required_option_is_reported(tmp_path, missing, capfd):
    assert main([o for o in good(tmp_path) if not o.startswith(missing)]) == 2
    assert f"error: expected option {missing}=…, got nothing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b"\n\n", "which is empty"),
        (
            b"user_id,item_id,follow,like,share,video_category,watching_times,gender,age\n1,2,0,0,0,c,1,1,1\n",
            "column click",
        ),
        (
            b"user_id,item_id,click,click,follow,like,share,video_category,watching_times,gender,age\n",
            "the column twice",
        ),
        (b"\x00\x01\x02PAR1 rubbish", "column user_id"),
    ],
)
def test_invalid_log_file_is_refused_with_the_reason(tmp_path, content, message, capfd):
    (tmp_path / "log.csv").write_bytes(content)
    assert main([f"input={tmp_path / 'log.csv'}", f"output={tmp_path / 'out'}", "scenario=qb_video"]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_lists_the_options(capsys):
    assert tuple(tenrec.SCENARIOS) == SCENARIOS
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("input", "protocol.min_clicks", "items_from", "spark.master"):
        assert name in out


def test_error_without_java_says_how_to_install_it(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nothing"))
    assert main([*good(tmp_path), "engine=spark"]) == 2
    failed = f"'No such file or directory' from {tmp_path}/nothing/bin/java of JAVA_HOME"
    assert f"error: expected Java 17 or newer, got {failed} (apt-get install" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]
    monkeypatch.setenv("PATH", "")
    assert main(good(tmp_path)) == 0  # a small log needs no Java


JAVA = """echo "$SPARK_HOME $SPARK_LOCAL_HOSTNAME $SPARK_LOCAL_IP" > {seen}
case "$1" in -version) echo 'openjdk version "17"' >&2 ;; *) echo "no heap" >&2; exit 1 ;; esac"""


def test_spark_startup_failure_is_a_one_line_error(tmp_path):
    """Spark is this environment's, whatever SPARK_HOME says, and the host name need not resolve."""
    home = java_home(tmp_path / "java", JAVA.format(seen=tmp_path / "seen"))
    options = [*good(tmp_path), "engine=spark"]
    env = os.environ | {"JAVA_HOME": str(home), "SPARK_HOME": "/nowhere"}
    for name in ("SPARK_LOCAL_IP", "SPARK_LOCAL_HOSTNAME", "PYSPARK_SUBMIT_ARGS"):
        env.pop(name, None)

    def run(**more: str) -> str:
        line = [sys.executable, "-m", "etl", *options]
        done = subprocess.run(line, env=env | more, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert run().startswith("error: expected a Spark session on local[*], got ")
    assert (tmp_path / "seen").read_text() == f"{Path(pyspark.__file__).parent} localhost 127.0.0.1\n"
    assert "PYSPARK_SUBMIT_ARGS that end in pyspark-shell, got --name x" in run(PYSPARK_SUBMIT_ARGS="--name x")
    options.append('spark.master="spark://no-such-host.invalid:7077"')
    assert "a Spark master at spark://no-such-host.invalid:7077, got no host of the name" in run()
    assert not (tmp_path / "out").exists()


def test_spark_logs_by_our_settings(tmp_path, monkeypatch):
    """They silence the warnings of a start."""
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    java_options = spark._settings(SparkOptions(), tmp_path, log_bytes=0)["spark.driver.extraJavaOptions"]
    file = Path(java_options.removeprefix("-Dlog4j2.configurationFile=file:"))
    assert "rootLogger.level = error" in file.read_text()


def test_wheel_with_an_unknown_hash_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "recbole-1.2.1-py3-none-any.whl", "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", "planted")
    with pytest.raises(InputError, match="known SHA-256"):
        to_csv(tmp_path / "recbole-1.2.1-py3-none-any.whl")


ODD = "é ü, a=b [x] (1) ~ ${y} #'; {q}"


@pytest.mark.parametrize("path", [f"/data/{ODD}", "a,b", "[x] y", "~x", "{a}", "x:y", "日本", "'", "$HOME"])
def test_paths_with_special_characters_need_no_quotes(path):
    etl = load([f"input={path}", f"output={path}/out", "scenario=qb_video", f"items_from={path}"])
    assert (etl.inputs, etl.output, etl.items_from) == ([path], f"{path}/out", path)
    assert load_retrieval([f"bundle={path}", f"data={path}", f"output={path}"]).bundle == path
    trainer = load_trainer([f"data={path}", f"output={path}", "model=hybrid", "tasks=[next, like]"])
    assert (trainer.data, trainer.tasks) == (path, ["next", "like"])
    assert load_cluster(["submit=etl", f"options=input={path} output=x"]).options == f"input={path} output=x"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("[A.csv,B.csv]", ["A.csv", "B.csv"]),
        ("[ é.csv , 'b, c.csv',\"[d],e\", x=y.csv]", ["é.csv", "b, c.csv", "[d],e", "x=y.csv"]),
        ("'a,b.csv'", ["a,b.csv"]),
        ('"[x]"', ["[x]"]),
        ("~/a.csv", [f"{Path.home()}/a.csv"]),
        ("[~/a.csv,b~]", [f"{Path.home()}/a.csv", "b~"]),
    ],
)
def test_lists_and_quoted_values_are_parsed(value, found):
    assert load([f"input={value}", "output=x", "scenario=qb_video"]).inputs == found


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("+new=1", "a known option, got +new"),
        ("++shards=3", "did you mean shards?"),
        ("~shards", "options as key=value"),
        ("~shards=3", "did you mean shards?"),
        ("hydra.run.dir=x", "a known option, got hydra.run.dir"),
        ("hydra/launcher=x", "a known option, got hydra/launcher"),
        ("protocol@x=study", "a known option, got protocol@x"),
        ("shards=1,2", "an integer for shards, got '1,2'"),
        ("shards=6(4", "an integer for shards, got '6(4'"),
        ("shards=[3]", "an integer for shards"),
        ("strict=no way", "true or false for strict"),
        ("seed=99999999999999999999", "seed below 2^63"),
        ("protocol=[study]", "the name of a preset for protocol"),
    ],
)
def test_hydra_syntax_is_refused_with_a_plain_message(option, message):
    with pytest.raises(InputError) as raised:
        load(["input=a", "output=b", "scenario=qb_video", option])
    assert message in f"expected {raised.value.expected}, got {raised.value.got} ({raised.value.hint})"


def test_input_and_output_folders_may_have_special_characters(tmp_path, capsys):
    folder = tmp_path / ODD
    folder.mkdir()
    rows = [(1, i, 1, 0, 0, 0, "c", 1, 1, 1) for i in range(12)]
    log = write_log(folder / "a[1], b.csv", [*rows, ("x", *rows[0][1:])])
    assert main([f"input={log}", f"output={folder}/out put", "scenario=qb_video", "engine=local"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f": {folder}/out put\n")
    assert err.splitlines()[-1].startswith("warning: 1 of 13 rows (7.69%) could not be read: user_id is not")


@dataclasses.dataclass
class Nothing:
    pass


def test_os_error_is_one_line_unless_a_traceback_is_requested(capsys, monkeypatch):
    def job(options):
        raise PermissionError(13, "Permission denied", "/some/file")

    assert run_program("x", Nothing, job, []) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: expected files and network that work, got [Errno 13] Permission denied: '/some/file'")
    assert err.count("\n") == 1
    with pytest.raises(PermissionError):
        run_program("x", Nothing, job, ["--traceback"])
    monkeypatch.setenv("NEXTCLICK_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        run_program("x", Nothing, job, [])


def test_characters_unknown_to_the_terminal_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", stream)
    assert run_program("x", Nothing, lambda options: print("7 rows → 1 session"), []) == 0
    assert stream.buffer.getvalue() == b"7 rows \\u2192 1 session\n"


@pytest.mark.parametrize("own", [None, "7"])
def test_openmp_spin_count_is_low_unless_the_user_sets_it(monkeypatch, own):
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")  # what the program sets is undone at the end
    if not own:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    seen = []
    assert run_program("x", Nothing, lambda options: seen.append(os.environ["GOMP_SPINCOUNT"]), []) == 0
    assert seen == [own or "10000"]


def test_options_that_flat_rows_do_not_read_are_named(tmp_path, capfd):
    log = ctr_log(tmp_path / "log.csv", rows=60, seed=1)
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=ctr", "protocol.first_rows=50"]
    assert main([*options, "protocol.min_clicks=20"]) == 0
    assert "warning: scenario=ctr does not read protocol.min_clicks\n" in capfd.readouterr().err
    assert main([*options, "overwrite=true"]) == 0
    assert "does not read" not in capfd.readouterr().err
