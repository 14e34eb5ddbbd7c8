"""A row-sharded item table: same run as with a replicated table, on any number W of workers, with 1 / W of the rows."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import trainer.inference.validation
import trainer.run.checkpoint
from retrieval.bundle import open_bundle
from tests.support.runs import killed_at_step, options
from tests.support.workers import run_workers
from tests.trainer.test_step import ALIKE, config, default_dtype, free_port, state_of, ten_steps
from tests.trainer.test_step import worker as step_worker
from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.distributed.row_lookup import RowLookup
from trainer.distributed.world import World
from trainer.loop import train
from trainer.models import embedding_table
from trainer.models.embedding_table import Shard, SparseTable
from trainer.option_groups import TABLES
from trainer.prepare import prepare
from trainer.run.checkpoint import latest
from trainer.show import main as show

CASES = {
    "gru4rec": ["model=gru4rec", "loss=bpr_max", "train.max_grad_norm=0.5"],
    "hybrid": ["network.tie_embeddings=false", "network.task_embedding_dim=2"],
    "features": ["model=gru4rec", "network.item_features=[category]"],
    "features of tasks": ["network.task_embedding_dim=2", "network.item_features=[category]"],
}
SHARDED, WHOLE = "train.table=sharded", "train.table=replicated"
NO_DROPOUT = ["network.embedding_dropout=0", "network.state_dropout=0"]
COMMON = ["train.ppmi_start=0", "train.epochs=2", "train.batch_tokens=128", "train.validate_steps=7", *NO_DROPOUT]


def worker(rank: int, size: int, meet: Path, settings: TrainerConfig, kill_at: int) -> None:
    torch.set_num_threads(1)
    trainer.inference.validation.SESSIONS_PER_BATCH = 7  # several batches on each worker, and not equally many
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    if kill_at:
        with killed_at_step(kill_at):
            train(settings, World.from_process_group())
    else:
        train(settings, World.from_process_group())
    os._exit(0)


def run(fifty, folder: Path, size: int, *more: str, kill_at: int = 0) -> Path:
    """Train on `size` workers, or in this process if it is 1."""
    settings, _ = prepare([*options(fifty, folder / "run"), *COMMON, *more])
    if size == 1 and kill_at:
        with killed_at_step(kill_at):
            train(settings, World.alone())
    elif size == 1:
        train(settings, World.alone())
    else:
        meet = folder / f"meet {size} {kill_at} {len(list(folder.iterdir()))}"
        run_workers(worker, (size, meet, settings, kill_at), nprocs=size)
    return folder / "run"


def complete(shards: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Complete tables from shards, of which that of worker r has every W-th row from r on."""
    result = {}
    for name in shards[0]:
        parts = [shard[name].numpy() for shard in shards]
        rows = [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
        result[name] = np.array(rows, parts[0].dtype).reshape(-1, *parts[0].shape[1:])
    return result


def final_tensors(run: Path) -> dict[str, np.ndarray]:
    path = latest(run / "checkpoints")
    result = {name: tensor.numpy() for name, tensor in load_file(path / "tensors.safetensors").items()}
    shards = [load_file(file) for file in sorted(path.glob("table-*.safetensors"))]
    return result | (complete(shards) if shards else {})


def logged(path: Path) -> dict[tuple, float]:
    """Losses and validation metrics by step, without times and memory."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/", "auc", "ndcg@", "hr@", "mrr@")
    return {(e["step"], e["split"], e["name"]): e["value"] for e in lines if e["name"].startswith(names)}


def assert_alike(one: Path, other: Path, atol: float = 1e-5) -> None:
    mine, expected = (logged(path) for path in (one, other))
    assert expected
    assert mine == pytest.approx(expected, abs=1e-5)
    tensors, wanted = (final_tensors(path) for path in (one, other))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=atol, err_msg=name)
    bundles = [open_bundle(path / "bundle") for path in (one, other)]
    np.testing.assert_allclose(*(bundle.item_vectors() for bundle in bundles), rtol=0, atol=atol)
    for split in ("valid", "test", "next"):
        queries = [list(bundle.queries(split)) for bundle in bundles]
        for part, expected_part in zip(*queries, strict=True):
            assert np.array_equal(part.user_id, expected_part.user_id)
            np.testing.assert_allclose(part.vector, expected_part.vector, rtol=0, atol=atol)
    for split, task in (("valid", "like"), ("test", "like")) if bundles[1].feedback_tasks("valid") else ():
        scores = [bundle.feedback(split, task) for bundle in bundles]
        assert scores[0].drop(["score"]).equals(scores[1].drop(["score"]))
        np.testing.assert_allclose(*(table["score"].to_numpy() for table in scores), rtol=0, atol=atol)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    assert summaries[0]["parameters"] == summaries[1]["parameters"]
    assert summaries[0]["best_epoch"] == summaries[1]["best_epoch"]


@pytest.mark.cluster
@pytest.mark.parametrize(("name", "size"), [("hybrid", 2), ("hybrid", 3), ("features", 2), ("features of tasks", 2)])
def test_sharded_run_is_bit_identical_to_a_replicated_one_on_as_many_workers(fifty, tmp_path, name, size):
    for table in TABLES:
        (tmp_path / table).mkdir()
    replicated, sharded = (run(fifty, tmp_path / t, size, f"train.table={t}", *CASES[name]) for t in TABLES)
    assert_alike(sharded, replicated, atol=0)
    path = latest(sharded / "checkpoints")
    assert sorted(file.name for file in path.glob("table-*")) == [f"table-{r:05d}.safetensors" for r in range(size)]
    whole = final_tensors(replicated)
    for rank in range(size):
        held = load_file(path / f"table-{rank:05d}.safetensors")
        for name, tensor in held.items():
            assert len(tensor) == len(whole[name][rank::size])


@pytest.mark.cluster
def test_sharded_runs_on_1_2_and_3_workers_equal_the_replicated_run_on_1(fifty, tmp_path):
    folders = [tmp_path / name for name in ("whole", "1", "2", "3")]
    for folder in folders:
        folder.mkdir()
    replicated = run(fifty, folders[0], 1, *CASES["gru4rec"])
    for size, folder in enumerate(folders[1:], 1):
        assert_alike(run(fifty, folder, size, SHARDED, *CASES["gru4rec"]), replicated)


@pytest.mark.cluster
def test_killed_sharded_run_resumes_bit_identical_on_as_many_workers(fifty, tmp_path):
    for name in ("calm", "broken"):
        (tmp_path / name).mkdir()
    calm = run(fifty, tmp_path / "calm", 2, SHARDED, *CASES["hybrid"])
    run(fifty, tmp_path / "broken", 2, SHARDED, *CASES["hybrid"], kill_at=13)
    assert latest(tmp_path / "broken" / "run" / "checkpoints").name < latest(calm / "checkpoints").name
    again = run(fifty, tmp_path / "broken", 2, SHARDED, *CASES["hybrid"])
    assert_alike(again, calm, atol=0)
    bundles = [open_bundle(path / "bundle").manifest for path in (calm, again)]
    assert [f.sha256 for f in bundles[0].files] == [f.sha256 for f in bundles[1].files]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, SHARDED), (3, SHARDED)),
        ((3, SHARDED), (2, SHARDED)),
        ((3, SHARDED), (1, WHOLE)),
        ((1, WHOLE), (3, SHARDED)),
    ],
)
def test_killed_run_resumes_with_other_workers_or_another_table_kind(fifty, calm, tmp_path, first, second):
    run(fifty, tmp_path, first[0], first[1], *CASES["gru4rec"], kill_at=13)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_alike(run(fifty, tmp_path, second[0], second[1], *CASES["gru4rec"]), calm)


@pytest.fixture(scope="module")
def calm(fifty, tmp_path_factory) -> Path:
    """The undisturbed run of one worker with a replicated table."""
    return run(fifty, tmp_path_factory.mktemp("calm"), 1, WHOLE, *CASES["gru4rec"])


@pytest.mark.cluster
def test_show_opens_a_sharded_run_and_a_damaged_shard_is_reported(fifty, calm, tmp_path, capfd):
    sharded = run(fifty, tmp_path, 3, SHARDED, *CASES["gru4rec"])
    shown = []
    for path in (sharded, calm):
        assert show([f"run={path}", "item=3", "k=5"]) == 0
        shown.append(capfd.readouterr().out)
    assert shown[0] == shown[1]
    newest = latest(sharded / "checkpoints")
    for path in (sharded / "checkpoints").glob("step-*"):
        file = path / "table-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-8:] = bytes(range(8))
        file.write_bytes(data)
    assert latest(sharded / "checkpoints") is None
    assert f"checkpoint {newest.name} is broken (its tensors are not those" in capfd.readouterr().err


def full_disk_worker(rank: int, meet: Path, settings: TrainerConfig) -> None:
    """The second worker's disk is full when it writes its second checkpoint."""
    written, save = 0, trainer.run.checkpoint.save_file

    def full(tensors, path):
        nonlocal written
        written += 1
        if rank == 1 and written == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    trainer.run.checkpoint.save_file = full
    worker(rank, 2, meet, settings, 0)


@pytest.mark.cluster
def test_full_disk_of_one_worker_skips_a_checkpoint_and_the_run_continues(fifty, calm, tmp_path, capfd):
    settings, _ = prepare([*options(fifty, tmp_path / "run"), *COMMON, SHARDED, *CASES["gru4rec"]])
    run_workers(full_disk_worker, (tmp_path / "meet", settings), nprocs=2)
    assert_alike(tmp_path / "run", calm)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["loss=softmax"], "loss=softmax"),
        (["network.transitions=true"], "network.transitions"),
        (["train.ppmi_start=1"], "train.ppmi_start"),
        (["model=rank_mmoe", "tasks=[click]"], "model=rank_mmoe"),
        (["output=s3://bucket/run"], "s3://bucket/run"),
        (["train.table=striped"], "train.table"),
    ],
)
def test_options_that_need_all_vectors_on_one_worker_are_refused(fifty, tmp_path, wrong, named, capfd):
    assert main([*options(fifty, tmp_path / "run"), "train.ppmi_start=0", SHARDED, *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
    assert named in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("n", "size"), [(100, 1), (100, 3), (1, 4), (257, 2), (64 * 4 + 3, 5)])
def test_shards_have_the_rows_of_the_full_table_and_their_share_of_memory(n, size, monkeypatch):
    """Initialised 64 rows at a time; a short remainder is drawn with the rows before it."""
    monkeypatch.setattr(embedding_table, "DRAWN_ROWS", 64)
    whole = torch.empty(n + 1, 5).normal_(0.0, 5**-0.5 * 0.5, generator=torch.Generator().manual_seed(3))
    whole[0] = 0.0
    biases = torch.arange(1.0, n + 1)
    for rank in range(size):
        generator = torch.Generator().manual_seed(3)
        table = SparseTable(n, 5, generator=generator, device=torch.device("cpu"), shard=Shard(rank, size))
        table.set_initial_biases(biases)
        assert torch.equal(table.vector, whole[rank::size])
        assert torch.equal(table.bias, torch.cat([torch.zeros(1), biases])[rank::size])
        held = sum(t.numel() * t.element_size() for t in table.tensors().values())
        assert held == len(range(rank, n + 1, size)) * 4 * (5 + 1 + 1 + 1)
        assert table.parameters() == (n + 1) * 6


def lookup_worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    world, found = World.from_process_group(), []
    tables = {name: small_table(name, Shard(rank, 3)) for name in ("item", "input")}
    lookup = RowLookup(tables, world)
    for number in range(2 * rank):  # the first worker reads nothing, the last one reads four times
        name = ("item", "input")[number % 2]
        found.append((name, lookup.tables[name].read(torch.tensor([[5, 0, 7], [number, 5, rank]]))))
    lookup.finish()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)


def small_table(name: str, shard: Shard) -> SparseTable:
    generator = torch.Generator().manual_seed(len(name))
    return SparseTable(8, 3, generator=generator, device=torch.device("cpu"), bias=name == "item", shard=shard)


@pytest.mark.cluster
def test_row_lookup_serves_workers_with_different_numbers_of_reads(tmp_path):
    run_workers(lookup_worker, (tmp_path,), nprocs=3)
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 2 * rank
        for number, (name, (vector, bias)) in enumerate(found):
            ids, table = torch.tensor([[5, 0, 7], [number, 5, rank]]), small_table(name, Shard())
            assert torch.equal(vector, table.vector[ids])
            assert vector.is_contiguous()  # as in a table: products of non-contiguous rows round differently
            assert torch.equal(bias, table.bias[ids] if name == "item" else torch.zeros(0))


POSSIBLE = {name: case for name, case in ALIKE.items() if case.get("loss") != "softmax" and "model" not in case}


@pytest.mark.cluster
@pytest.mark.parametrize("name", POSSIBLE)
def test_ten_steps_with_shards_equal_one_worker(fifty, tmp_path, name):
    """In float64, for the reason given in the test of replicated tables."""
    settings = config(fifty.path, **POSSIBLE[name])
    with default_dtype(torch.float64):
        one = state_of(ten_steps(settings, World.alone()))
    settings.train.table = "sharded"
    for size in (2, 3):
        run_workers(step_worker, (size, free_port(), settings, str(tmp_path), torch.float64), nprocs=size)
        states = [torch.load(tmp_path / f"{size}-{rank}.pt") for rank in range(size)]
        tables = complete([{n: t for n, t in state.items() if n.startswith("table.")} for state in states])
        for tensor, expected in one.items():
            for state in [tables] if tensor in tables else states:
                np.testing.assert_allclose(state[tensor], expected, rtol=0, atol=1e-5, err_msg=f"{size} {tensor}")
