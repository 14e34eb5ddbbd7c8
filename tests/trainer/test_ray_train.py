"""Resource requests to Ray and the translation of its failures, without starting it."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError

from etl.runtime.errors import InputError
from trainer.config import load
from trainer.ray_train import ConnectedTorchBackend, ConnectedTorchConfig, _explained, _scaling, ray_session


def config(*more: str):
    return load(["data=d", "output=o", "model=gru4rec", "ray.workers=1", *more])


def test_workers_spread_over_hosts_and_take_the_requested_cores(monkeypatch):
    scaling = _scaling(config(), 4)
    assert (scaling.num_workers, scaling.placement_strategy) == (4, "SPREAD")
    assert scaling.resources_per_worker == {"CPU": 1}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # possibly more cores than this machine has
    scaling = _scaling(config("ray.cores=64", "ray.use_gpu=true", "ray.spread=false"), (1, 2))
    assert scaling.placement_strategy == "PACK"
    assert scaling.resources_per_worker == {"CPU": 64, "GPU": 1}
    with pytest.raises(InputError, match=r"ray\.cores of at least 1, got 0"):
        config("ray.cores=0")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "no answer from 127.0.0.1:1"),
        ("ray://x.invalid:1", "no host of the name"),
        ("h:x", "no HOST:PORT"),
    ],
)
def test_unreachable_cluster_is_a_plain_error(monkeypatch, address, why):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=f"a Ray cluster at RAY_ADDRESS={address}, got {why}"), ray_session():
        pass


class Group:
    """A worker group whose second worker does not reach the first one's host."""

    def execute(self, function, *args):
        if function.__name__ == "unreachable":
            assert args == ([("a", 1), ("b", 1)],)
            return [[], ["a"]]
        return ["a", "b"]

    def execute_single_async(self, _rank, function, node):
        return function.__name__, node


def test_process_group_is_not_started_if_workers_cannot_reach_each_other(monkeypatch):
    monkeypatch.setattr(
        "trainer.ray_train.ray.get", lambda calls: [(node, 1) for name, node in calls if name == "listen"]
    )
    backend = ConnectedTorchConfig().backend_cls()
    assert isinstance(backend, ConnectedTorchBackend)
    with pytest.raises(InputError, match="workers that reach one another, got no connection from b to a"):
        backend.on_start(Group(), ConnectedTorchConfig())


def test_failures_of_ray_train_become_errors_with_a_hint():
    own = InputError("a", "b", "c")
    assert _explained(ControllerError(own), config()) is own
    full = WorkerGroupError("OSError: No space left on device", {})
    assert "room on the disk" in str(_explained(full, config()))
    assert "controller to stay alive" in str(_explained(ActorDiedError(), config()))
    late = _explained(ControllerError(RuntimeError("no node\nmore")), config())
    assert "a cluster that can start 1 workers, got no node (" in str(late)
    bug = WorkerGroupError("KeyError", {})
    assert _explained(bug, config()) is bug
