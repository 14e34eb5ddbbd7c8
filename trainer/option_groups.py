"""The groups `network` and `train` of the options of `python -m trainer`."""

from __future__ import annotations

from dataclasses import dataclass

from etl.runtime.options import option

OPTIMIZERS = ("adagrad", "adamw")
TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad")
SCHEDULES = ("constant", "cosine")
BALANCES = ("fixed", "uncertainty")
TABLES = ("replicated", "sharded")
PRECISIONS = ("float32", "bfloat16")
BLOCKS = ("sasrec", "ligr")


@dataclass
class AutoOptions:
    """How `recipe=auto` chooses among the recipes of a catalogue size."""

    targets: int = option(
        200_000,
        "target clicks for which recipe=auto trains each of several recipes before the one that is best on valid is "
        "trained, in full epochs, from two to half of train.epochs; 0 takes the first",
        at_least=0,
    )
    candidates: list[str] = option(
        [], "recipes that recipe=auto tries, as [small,medium]; [] = those that the model has for the catalogue's size"
    )


@dataclass
class ModelOptions:
    """Sizes of the networks."""

    embedding_dim: int = option(64, "dimension of item embeddings and of expert outputs", at_least=1)
    hidden_size: int = option(64, "units of an encoder's state", at_least=1)
    layers: int = option(
        1, "layers of gru4rec and sasrec; repetitions of nextitnet's blocks of network.dilations", at_least=1
    )
    dilations: list[int] = option([1, 4], "nextitnet: dilation of each residual block; one of d looks 6 d clicks back")
    attention_heads: int = option(1, "attention heads of sasrec, a divisor of network.hidden_size", at_least=1)
    attention_block: str = option(
        "sasrec", "block of sasrec: as in its paper, or ligr (gated residuals, SwiGLU; as eSASRec)", choices=BLOCKS
    )
    relative_positions: bool = option(
        False, "sasrec: a learned bias of the attention by distance instead of vectors of positions"
    )
    positions: int = option(0, "clicks of the longest session, for sasrec; 0 = the dataset's", at_least=0)
    gnn_steps: int = option(1, "gated steps over srgnn's session graph", at_least=1)
    experts: int = option(
        8, "experts of the MMoE head, divided evenly among several encoders; at least one for each", at_least=1
    )
    shared_experts: int = option(4, "PLE: shared experts of a level", at_least=1)
    task_experts: int = option(1, "PLE: experts of each task on a level", at_least=1)
    levels: int = option(2, "PLE: levels", at_least=1)
    expert_norm: bool = option(False, "layer norm and swish on the output of each expert (as HoME)")
    gate_preference: float = option(
        0.0, "initial lead, in logits, of a task's own share of the experts in its gate (mmoe, ple)", at_least=0
    )
    task_embedding_dim: int = option(
        0, "dimension of item embeddings that each feedback task of the hybrid has to itself (as STEM)", at_least=0
    )
    feedback_feature_dim: int = option(
        0,
        "dimension of the embeddings that only the hybrid's feedback towers read: item features of the candidate and "
        "their mean over the past clicks; 0 = none",
        at_least=0,
    )
    feedback_features: list[str] | None = option(
        None,
        "text columns of items.parquet that the feedback towers embed; null = those of network.item_features, or "
        "category if there are none, that have at most 10,000 values",
    )
    feedback_actions: bool = option(
        False,
        "the feedback towers also embed the actions on past clicks (like, share, …), in the same dimension",
    )
    tower: int = option(64, "units of the hidden layer of each task's tower", at_least=1)
    residual: bool = option(True, "experts and the next click's tower add to their input instead of replacing it")
    embedding_dropout: float = option(
        0.2, "dropout of clicks (gru4rec, srgnn) or of embedding values (sasrec, nextitnet)", at_least=0, below=1
    )
    state_dropout: float = option(0.2, "dropout of the encoder's state", at_least=0, below=1)
    tie_embeddings: bool = option(True, "use the same item embeddings for the encoder's input and for retrieval")
    popularity_bias: bool = option(False, "initialise item biases to the log of train clicks (softmax losses)")
    popularity_weight: float | None = option(
        None,
        "add this × log(1 + train clicks) to each item's score at inference, as part of its bias; null = fitted on "
        "valid after training, 0 = none",
        at_least=0,
    )
    cosine_temperature: float | None = option(
        None,
        "the score is the cosine of query and item vector divided by this temperature, as 0.1; null = inner product",
        above=0,
    )
    profile: bool = option(False, "append gender and age to the encoder's state")
    item_features: list[str] = option(
        [], "text columns of items.parquet whose values have vectors that are added to an item's own, as [category]"
    )
    past_actions: bool = option(
        False,
        "the encoder sees what was done with past clicks (like, share, …, how often entered); session models only",
    )
    transitions: bool = option(
        False,
        "add what was counted between an item and the last clicks in train to its score (sequential rules, cosine of "
        "co-occurrence, first-order Markov), by weights fitted on valid",
    )
    detach_items: bool = option(False, "stop gradients of the feedback tasks at the item embeddings")


@dataclass
class TrainOptions:
    """Optimisation, losses and validation."""

    epochs: int = option(10, "maximum number of passes over the train clicks", at_least=1)
    batch_tokens: int = option(512, "target clicks of a global step, over all workers", at_least=1)
    learning_rate: float = option(
        0.05, "learning rate of the embedding tables; of the networks too unless network_learning_rate is set", above=0
    )
    feature_rate: float = option(
        0.2,
        "learning rate of the vectors of item features, relative to that of the items' own; 1 finds more items that "
        "were never clicked (loss=softmax needs it), 0.2 ranks the others better",
        above=0,
    )
    network_learning_rate: float | None = option(None, "learning rate of the networks; null = learning_rate", above=0)
    head_learning_rate: float | None = option(
        None, "learning rate of the experts, gates and towers of the hybrid; null = that of its encoders", above=0
    )
    feedback_learning_rate: float | None = option(
        None, "learning rate of the hybrid's feedback towers; null = that of its head", above=0
    )
    optimizer: str = option("adagrad", "optimizer of the networks", choices=OPTIMIZERS)
    table_optimizer: str = option("rowwise_adagrad", "optimizer of the embedding tables", choices=TABLE_OPTIMIZERS)
    weight_decay: float = option(
        0.0, "weight decay of the networks, decoupled with adamw, else added to the gradient", at_least=0
    )
    table: str = option(
        "replicated",
        "item table: replicated = complete on each worker; sharded = each worker holds the rows that it owns, for "
        "tables that outgrow a worker (session models with sampled losses)",
        choices=TABLES,
    )
    ppmi_start: float = option(
        0.0,
        "length of item vectors that begin as factors of the items' co-occurrence in train (PPMI); 0 = random vectors",
        at_least=0,
    )
    table_decay: float = option(0.0, "weight decay of the embeddings that a step touches", at_least=0)
    schedule: str = option("constant", "learning rate schedule after the warm-up", choices=SCHEDULES)
    warmup_steps: int = option(
        0, "steps over which the learning rates rise linearly from 0; from 256 units on 100 by default", at_least=0
    )
    max_grad_norm: float = option(0.0, "maximum global norm for gradient clipping; 0 = off", at_least=0)
    negatives: int = option(
        2048, "sampled negatives of a step, shared by its targets (all losses but softmax)", at_least=1
    )
    negative_popularity_exponent: float | None = option(
        None,
        "exponent of train clicks in the sampling of negatives: 0 = all clicked items alike, 1 = by popularity; "
        "null = 0.5 (gbce: 0)",
        at_least=0,
        at_most=10,
    )
    negative_uniform_share: float = option(
        0.1, "share of negatives that are sampled uniformly from all items", at_least=0, below=1
    )
    logq: float = option(
        1.0,
        "strength of the correction of sampled_softmax for how often a negative is drawn: 1 = the sum of the negatives "
        "estimates that of all items, 0 = none",
        at_least=0,
        at_most=1,
    )
    batch_positives: bool = option(False, "add the step's targets to its negatives")
    hard_negatives: int = option(
        0,
        "drawn negatives with the highest scores that each target competes with, the others being left out (as TRON); "
        "0 = all",
        at_least=0,
    )
    skipped_negatives: int = option(
        0, "maximum number of shown but not clicked items added to a target's negatives", at_least=0
    )
    bpr_max_regularisation: float = option(1.0, "weight of the score regularisation of bpr_max", at_least=0)
    gbce_t: float = option(
        0.75, "calibration of gbce: 0 = plain binary cross-entropy, 1 = that of all items", at_least=0, at_most=1
    )
    balance: str = option("fixed", "weighting of the tasks' losses", choices=BALANCES)
    task_weights: dict[str, float] = option({}, "fixed loss weight by task; default 1 or the recipe's")
    positive_rates: dict[str, float] = option({}, "share of positives by feedback task; default: counted in train")
    positive_power: float = option(
        0.0, "positives of a feedback task are weighted by (negatives / positives) to this power", at_least=0
    )
    prefixes: int = option(
        0, "maximum number of target clicks of a session in an epoch, resampled each epoch; 0 = all", at_least=0
    )
    exposures: bool = option(True, "train feedback tasks on all exposures, not on clicks alone")
    exposures_per_session: int = option(
        60, "maximum number of feedback rows of a session in a step, resampled each epoch", at_least=1
    )
    valid_sessions: int = option(10_000, "sessions in the fixed validation sample", at_least=1)
    validate_steps: int = option(0, "validate every N steps inside an epoch; 0 = only at its end", at_least=0)
    select_by: str | None = option(
        None, "validation metric that selects the best epoch; null = ndcg@20, for ranking models auc (mean over tasks)"
    )
    best_epoch_by_task: bool = option(
        False,
        "score each feedback task with the parameters of the epoch with its own highest valid AUC; keeps a checkpoint "
        "for each such epoch",
    )
    early_stopping_patience: int = option(3, "epochs without improvement before early stopping", at_least=1)
    gradient_accumulation_steps: int = option(
        1, "micro-batches that a worker's share of a step is split into, to save memory", at_least=1
    )
    precision: str = option(
        "float32", "precision of matrix products (float32 on a GPU is TF32); bfloat16 needs a GPU", choices=PRECISIONS
    )
    profile: bool = option(False, "write a trace and a table of the time by operation to RUN/profile")
    refit: bool = option(False, "train again with the valid clicks for the selected number of epochs")
    shuffle_buffer_sessions: int = option(16_384, "sessions shuffled together in memory", at_least=1)
    checkpoint_steps: int = option(2_000, "steps between checkpoints inside an epoch", at_least=1)
    keep_checkpoints: int = option(2, "latest checkpoints retained in addition to the best", at_least=1)
