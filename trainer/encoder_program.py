"""The encoder of a finished run as a torch.export program: clicks in, query vectors out."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import nn

from etl.dataset import Dataset, describe_file
from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.object_store import local_path, refuse_output, staged_output
from etl.runtime.output_folder import OutputFolderType, listed_files
from retrieval.bundle_folder import RUN_BUNDLE
from trainer.distributed.world import World
from trainer.finished_run import load_exported, open_run
from trainer.inference.scorer import SessionScorer
from trainer.program_configs import ExportConfig
from trainer.task.registry import model_task_of
from trainer.task.sessions import SessionTask
from trainer.training.objective import INPUT, ITEM

ENCODER, ITEMS = "encoder.pt2", "items.parquet"
EXPORT = OutputFolderType(
    "an export", MANIFEST, lambda data: listed_files(data, {"inputs", "dimension", "length"}, MANIFEST)
)
EXAMPLES, MAX_SESSIONS = 4, 4_096
"""Number of sessions in the example input for tracing, and the maximum batch size."""


class ExportedEncoder(nn.Module):
    """Query vectors of sessions, after the last click.

    Args:
        scorer: the trained model; its tables are stored in the program.
    """

    clicked: torch.Tensor

    def __init__(self, scorer: SessionScorer) -> None:
        super().__init__()
        self.model = copy.deepcopy(scorer.model).eval()
        del self.model.item_features  # already added to the vectors; torch cannot save its empty tables
        self.model.feedback_features = None  # not used by queries
        name = INPUT if INPUT in scorer.tables else ITEM
        every = torch.arange(scorer.tables[name].n_rows, device=scorer.device)
        vectors = scorer.model.item_features.vectors(scorer.tables, name, every)
        self.register_buffer("clicked", vectors.detach().clone())

    def forward(
        self, items: torch.Tensor, lengths: torch.Tensor, profile: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Queries `[B, D + 1]`; scores are their inner products with the vectors of `items.parquet`.

        Args:
            items: int64 `[B, T]`, dense ids, oldest first, right-padded with 0.
            lengths: int64 `[B]`, number of clicks of each session, at least 1.
            profile: int64 `[B, 2]`, gender and age, -1 where unknown.
            actions: int64 `[B, T]`, action codes of the clicks; 0 if the model does not read them.
        """
        last = torch.arange(items.shape[0], device=items.device) * items.shape[1] + lengths - 1
        read = actions if self.model.past_actions is not None else None
        state = self.model.states(items, self.clicked[items], profile, last, read)
        query = self.model.query(self.model.task_representations(state)["next"])
        return torch.cat([query, query.new_ones(query.shape[0], 1)], dim=1)


def export_encoder(options: ExportConfig) -> None:
    """Write `encoder.pt2`, `items.parquet` and a manifest.

    Raises:
        InputError: no finished run of a session model, an untraceable encoder, or an output of another program.
    """
    read = [path for path in (options.run, options.data) if path]
    refuse_output(options.output, EXPORT, overwrite=options.overwrite, inputs=read)
    config, dataset = open_run(options.run, options.data)
    if config.is_ranking_model:
        raise InputError("the run of a session model", config.model, "ranking models have no encoder")
    run = local_path(options.run)
    model_task = model_task_of(config, dataset, World.alone())
    assert isinstance(model_task, SessionTask)
    train_step = model_task.train_step(total_steps=1)
    load_exported(run, config, model_task, train_step)
    scorer = model_task.scorer(train_step)
    program = trace(ExportedEncoder(scorer), dataset)
    with staged_output(options.output, EXPORT, overwrite=options.overwrite, inputs=read) as folder:
        archive = io.BytesIO()  # on a full disk torch's writer of files aborts the process
        torch.export.save(program, archive)
        (folder / ENCODER).write_bytes(archive.getbuffer())
        table = pq.read_table(run / RUN_BUNDLE / ITEMS)
        ids = dataset.items(["item", "item_id"])
        pq.write_table(table.append_column("item_id", ids["item_id"]), folder / ITEMS, compression="zstd")
        write_manifest(folder, scorer, dataset, model_task.name)


def trace(encoder: ExportedEncoder, dataset: Dataset) -> torch.export.ExportedProgram:
    """Trace the encoder with a dynamic batch size; sessions are padded to the dataset's longest.

    Raises:
        InputError: the encoder's control flow depends on its input values.
    """
    longest = dataset.manifest.max_clicks
    items = torch.ones((EXAMPLES, longest), dtype=torch.int64)
    lengths = torch.arange(1, EXAMPLES + 1).clamp(max=longest)
    example_inputs = (items, lengths, torch.full((EXAMPLES, 2), -1), torch.zeros_like(items))
    sessions = torch.export.Dim("sessions", min=1, max=MAX_SESSIONS)
    shapes = {name: {0: sessions} for name in ("items", "lengths", "profile", "actions")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # a GRU's flattened weights alias its parameters, which is harmless here
        try:
            return torch.export.export(encoder, example_inputs, dynamic_shapes=shapes)
        except (torch._dynamo.exc.UserError, RuntimeError) as error:
            cause = str(error).splitlines()[0][:160]
            hint = "srgnn builds a graph of each session, which torch.export cannot trace"
            raise InputError("an encoder that torch.export can trace", cause, hint) from None


def write_manifest(folder: Path, scorer: SessionScorer, dataset: Dataset, model: str) -> None:
    """Describe the files, so that a server does not need this package."""
    rows = {ENCODER: 1, ITEMS: dataset.manifest.n_items}
    files = [vars(describe_file(folder, name, count)) for name, count in rows.items()]
    longest = dataset.manifest.max_clicks
    write_json(
        folder / MANIFEST,
        {
            "model": model,
            "dataset": dataset.manifest.fingerprint,
            "length": longest,
            "dimension": scorer.dimension,
            "inputs": {
                "items": ["int64", ["sessions", longest]],
                "lengths": ["int64", ["sessions"]],
                "profile": ["int64", ["sessions", 2]],
                "actions": ["int64", ["sessions", longest]],
            },
            "reads_profile": scorer.model.profile is not None,
            "reads_actions": scorer.model.past_actions is not None,
            "transitions": scorer.term is not None and scorer.term.is_used,
            "torch": torch.__version__,
            "files": files,
        },
    )
