"""Security settings of Spark clusters in `action=up` and `docs/cluster.md`: everything open by default is closed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.local import spark_defaults

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
CLOSED = {
    "spark.authenticate": "true",
    "spark.network.crypto.enabled": "true",
    "spark.master.rest.enabled": "false",
    "spark.ui.killEnabled": "false",
    "spark.master.ui.decommission.allow.mode": "DENY",
}


def of_action_up() -> dict[str, str]:
    return dict(line.split() for line in spark_defaults("s").splitlines())


def of_readme() -> dict[str, str]:
    """Settings that the page's command writes to spark-defaults.conf."""
    command = PAGE.split("printf '%s\\n' ")[1].split("> /shared/keys/spark-defaults.conf")[0]
    return dict(setting.split(maxsplit=1) for setting in re.findall(r'"(spark\.[^"]+)"', command))


@pytest.mark.parametrize("settings", [of_action_up, of_readme])
def test_cluster_settings_require_the_secret_everywhere(settings):
    actual = settings()
    assert {name: actual.get(name) for name in CLOSED} == CLOSED
    assert actual["spark.authenticate.secret"]
