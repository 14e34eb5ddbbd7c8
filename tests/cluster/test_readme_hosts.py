"""README's commands for several hosts, run line by line; two of the three hosts do not have the code."""

from __future__ import annotations

import json

import pytest

from etl.engines.java import OLDEST_JAVA, java_version

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]


def test_readme_commands_run_the_complete_pipeline_over_three_hosts(cluster, pipeline):
    assert pipeline.returncode == 0, pipeline.output[-6000:]
    for host in (2, 3):
        assert "Executor" in cluster.logs(host, "spark")
    assert (pipeline.work / "hybrid-result" / "report.html").is_file()
    assert pipeline.trained_on == {2, 3}  # though each host alone has cores for both workers
    assert json.loads((pipeline.run / "summary.json").read_text())["workers"] == 2
