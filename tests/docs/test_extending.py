"""The diff in docs/extending.md adds a working encoder to a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq

from tests.docs.options_page import PAGE
from tests.support.runs import SMALL

ROOT = PAGE.parents[1]
SERVE = """
import sys
from trainer.program_configs import ServeConfig
from trainer.serving.recommendation_service import RecommendationService
from trainer.serving.session_request import SessionRequest

recommender = RecommendationService.open(ServeConfig(run="run", result="result"))
answer = recommender.recommend([SessionRequest(items=[int(item) for item in sys.argv[1:]])], 5)
print(sum(item > 0 for item in answer.items[0]))
"""


def test_diff_in_extending_md_adds_a_working_encoder(fifty, tmp_path):
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[1]
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE) == [
        "tests/trainer/test_decay.py",
        "trainer/conf/recipes/small_decay.yaml",
        "trainer/models/decay.py",
        "trainer/config.py",
    ]
    for name in ("etl", "trainer", "retrieval", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "benchmarks"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    applied = {"cwd": tmp_path, "env": os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}}
    subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, **applied)

    def python(*words: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    padding = "changes_no_state or padding"
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trainer/test_decay.py")
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trainer/test_models.py", "-k", padding)
    small = [option for option in SMALL if not option.startswith("ray.")]
    python("-m", "trainer", f"data={fifty.path}", "output=run", "model=decay", "ray.workers=0", *small)
    python("-m", "trainer", f"data={fifty.path}", "output=h", "model=hybrid", "encoder=decay", "ray.workers=0", *small)
    python("-m", "retrieval", "bundle=run/bundle", f"data={fifty.path}", "output=result", "blend=none")
    python("-m", "trainer.export", "run=run", "output=export")
    assert (tmp_path / "export" / "encoder.pt2").is_file()
    topk = pq.read_table(tmp_path / "result" / "topk.parquet")["item_ids"].to_pylist()
    assert python("-c", SERVE, *topk[0][:3]).strip() == "5"
