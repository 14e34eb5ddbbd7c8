"""A cluster of several processes on this machine."""

from __future__ import annotations

import http.client
import json
import os
import stat
import sys
import urllib.request
from pathlib import Path
from subprocess import Popen

import psutil
import pyarrow.parquet as pq
import pyspark
import pytest

from cluster.__main__ import main
from etl.engines.java import OLDEST_JAVA, java_version
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.retrieval.test_parts import without_times
from tests.support.logs import generated_log
from tests.support.runs import SMALL

ROOT = Path(__file__).parents[2]
SUBMISSION = {
    "action": "CreateSubmissionRequest",
    "clientSparkVersion": pyspark.__version__,
    "appResource": "file:///nowhere.py",
    "mainClass": "org.apache.spark.deploy.SparkSubmit",
    "appArgs": [],
    "environmentVariables": {},
    "sparkProperties": {"spark.app.name": "stranger", "spark.submit.deployMode": "cluster"},
}
"""A submission that Spark's REST server would start on a worker for any client."""


def assert_spark_takes_nothing_without_the_secret(processes: list[dict]) -> None:
    """Master and worker listen on loopback only, each for RPC and its web page; neither accepts a posted submission."""
    for name in ("spark-master", "spark-worker-1"):
        (pid,) = (entry["pid"] for entry in processes if entry["name"] == name)
        actual = [c.laddr for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert {address.ip.removeprefix("::ffff:") for address in actual} == {"127.0.0.1"}
        assert len(actual) == 2
        for address in actual:
            url = f"http://127.0.0.1:{address.port}/v1/submissions/create"
            request = urllib.request.Request(url, json.dumps(SUBMISSION).encode(), {"Content-Type": "application/json"})
            with pytest.raises((OSError, http.client.HTTPException)):
                urllib.request.urlopen(request, timeout=20)


def assert_result_of_one_process(result: Path, options: list[str], alone: Path) -> None:
    """The evaluation by Ray tasks equals that of one process bit by bit: ranks, lists and scores."""

    def untimed(metrics: dict) -> dict:
        blend = {name: value for name, value in metrics["blend"].items() if name != "milliseconds"}
        return without_times(metrics) | {"blend": without_times(blend)}

    evaluate(load([*options, f"output={alone}"]))
    actual, expected = (json.loads((each / "metrics.json").read_text()) for each in (result, alone))
    assert actual["blend"]["kind"] in ("sum", "reranker")
    assert untimed(actual) == untimed(expected)
    for name in ("ranks.parquet", "topk.parquet"):
        assert pq.read_table(result / name).equals(pq.read_table(alone / name))


@pytest.mark.cluster
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_local_cluster_runs_all_programs_and_stops_all_its_processes(tmp_path, capfd):
    state = [f"local.state={tmp_path / 'c'}", "local.nodes=1"]
    assert main(["action=up", *state]) == 0
    try:
        message = json.loads((tmp_path / "c" / "state.json").read_text())
        token = tmp_path / "c" / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert main(["action=up", *state]) == 2
        assert main(["action=status", *state]) == 0
        assert "ended" not in capfd.readouterr().out
        assert_spark_takes_nothing_without_the_secret(message["processes"])
        log = generated_log(tmp_path / "log.csv", users=40, items=30, seed=3)
        data, run = tmp_path / "data", tmp_path / "run"
        env = os.environ | {"RAY_AUTH_TOKEN_PATH": str(token), "SPARK_CONF_DIR": str(tmp_path / "c" / "spark")}

        def submitted(what: str, target: str, address: str, options: str, env: dict[str, str] = env) -> Popen:
            line = [sys.executable, "-m", "cluster", f"submit={what}", f"target={target}", f"address={address}"]
            line += [f"python={sys.executable}", f"options={options}"]
            return Popen(line, cwd=ROOT, env=env)

        etl = f"input={log} scenario=qb_video shards=2"
        unknown = env | {"SPARK_CONF_DIR": str(tmp_path / "nowhere")}  # is refused after Spark's many retries
        stranger = submitted("etl", "standalone", message["spark"], f"{etl} output={tmp_path / 'strange'}", unknown)
        nothing = submitted("train", "ray", message["ray"], "data=/nowhere output=x model=gru4rec")
        assert submitted("etl", "standalone", message["spark"], f"{etl} output={data}").wait(300) == 0
        assert nothing.wait(300) == 2
        train = f"data={data} output={run} model=gru4rec {' '.join(SMALL[:-3])} train.epochs=1 ray.workers=1"
        assert submitted("train", "ray", message["ray"], train).wait(300) == 0
        evaluation = f"bundle={run / 'bundle'} data={data} output={tmp_path / 'result'}"
        assert submitted("evaluate", "ray", message["ray"], evaluation).wait(300) == 0
        assert_result_of_one_process(tmp_path / "result", evaluation.split()[:2], tmp_path / "alone")
        assert stranger.wait(300) not in (0, None)
        assert not (tmp_path / "strange").exists()
        secret = (tmp_path / "c" / "spark" / "spark-defaults.conf").read_text().split("secret ")[1].split()[0]
        for text in (p.read_text(errors="replace") for p in (tmp_path / "c").glob("*.log")):
            assert token.read_text() not in text
            assert secret not in text
    finally:
        assert main(["action=down", *state]) == 0
    assert "ray-head ended" in capfd.readouterr().out
    assert not token.exists()
    assert not Path(message["temporary"]).exists()
