"""The experiments of the study: question, model variants and comparison metrics of each.

An experiment is data: adding one means adding an entry to `EXPERIMENTS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.study.experiment import Experiment, Variant
from cluster.study.published import MERLIN_PUBLISHED, ROWS_PUBLISHED, SESSIONS_PUBLISHED

FEEDBACK = tuple(f"auc/{task}{of}" for task in ("click", "like", "share", "follow") for of in ("", "_given_click"))
GAUC = tuple(f"gauc/{task}" for task in ("click", "like", "share", "follow"))
EVERY_BASELINE = ("popularity", "last_item", "markov", "sequential_rules", "item_knn", "v_sknn", "stan")


def model(name: str, *options: str, label: str = "") -> Variant:
    """A model with its recipe, and further options."""
    return Variant(label or name, (f"model={name}", *options))


GRU4REC = Variant(
    "gru4rec", ("model=gru4rec",), ("blend=auto", f"baselines=[{','.join(EVERY_BASELINE)}]", "mask_seen=auto")
)
HYBRID = model("hybrid")


def gru4rec_ranker(ranker: str, label: str = "") -> Variant:
    """Another ranker in the result of `gru4rec`: a baseline or the blend."""
    return Variant(label or ranker, GRU4REC.trainer, GRU4REC.retrieval, ranker=ranker)


NEXT_CLICK = Experiment(
    "next-click",
    "Which model finds the next click?",
    "Every session model by its recipe, alone and under the multi-task hybrid, next to counting without training and "
    "to the blend of gru4rec with the counted sources. All are judged on the same test queries.",
    (
        GRU4REC,
        *(gru4rec_ranker(name) for name in EVERY_BASELINE),
        gru4rec_ranker("blend", "blend of gru4rec and counts"),
        model("srgnn", "train.prefixes=8"),
        model("sasrec"),
        model("nextitnet"),
        HYBRID,
        model("hybrid", "encoder=sasrec", label="hybrid over sasrec"),
        model("hybrid", "encoder=nextitnet", label="hybrid over nextitnet"),
    ),
    pairs={"hybrid over sasrec": "sasrec", "hybrid over nextitnet": "nextitnet"},
)
MULTI_TASK = Experiment(
    "feedback",
    "Does training several tasks together help each of them?",
    "Ranking models with one network per task, a shared bottom, MMoE, ESMM and PLE over the same features, and the "
    "hybrid's feedback tasks. AUC over all rows shown, and given a click.",
    (
        model("rank_single"),
        model("rank_shared_bottom"),
        model("rank_mmoe"),
        model("rank_esmm"),
        model("rank_ple"),
        HYBRID,
    ),
    metrics=(*FEEDBACK, *GAUC),
)
LADDER = Experiment(
    "ladder",
    "What does each part of the hybrid give?",
    "From gru4rec to the hybrid one step at a time, then with item features, past actions and counted transitions; "
    "gru4rec with about as many parameters as the hybrid tells size from structure.",
    (
        GRU4REC,
        model("gru4rec", "network.hidden_size=256", "train.network_learning_rate=0.01", label="gru4rec, matched size"),
        model("hybrid", "tasks=[next]", label="experts, next click alone"),
        model("hybrid", "head=shared_bottom", label="shared bottom"),
        HYBRID,
        model("hybrid", "network.gate_preference=2", label="hybrid, gates set apart"),
        model("hybrid", "train.best_epoch_by_task=true", label="hybrid, best epoch of each task"),
        model("hybrid", "network.feedback_feature_dim=0", label="hybrid, towers of item vectors alone"),
        model("hybrid", "network.item_features=[category]", label="hybrid + item features"),
        model("hybrid", "network.past_actions=true", label="hybrid + past actions"),
        model("hybrid", "network.transitions=true", label="hybrid + transitions"),
        model(
            "hybrid",
            "network.item_features=[category]",
            "network.past_actions=true",
            "network.transitions=true",
            label="hybrid + all three",
        ),
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10", *FEEDBACK),
)
NEGATIVE_FEEDBACK = Experiment(
    "negative-feedback",
    "What is it worth to know what was shown and not clicked?",
    "The hybrid by its recipe, which trains its feedback tasks on all rows shown; on clicks alone; and with items that "
    "were shown and skipped among the negatives of the next click; and with a task for clicks without another action.",
    (
        HYBRID,
        model("hybrid", "train.exposures=false", label="hybrid, clicks alone"),
        model("hybrid", "train.skipped_negatives=2", label="hybrid, skipped items as negatives"),
        model("hybrid", "tasks=[next,like,share,follow]", label="hybrid without the task click"),
        model("hybrid", "tasks=[next,click,like,share,follow,passive]", label="hybrid with the task passive"),
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10", *FEEDBACK),
    unclicked=True,
)
SEVERAL_ENCODERS = Experiment(
    "several-encoders",
    "Are several session models in one better than one?",
    "The hybrid over two encoders, whose experts are divided evenly, against the hybrid over either alone, against the "
    "mean of the normalised scores of these two, and against the blend of gru4rec with the counted sources. A mean "
    "costs what its members cost together.",
    (
        HYBRID,
        model("hybrid", "encoder=srgnn", "train.prefixes=8", label="hybrid over srgnn"),
        model("hybrid", "encoder=sasrec", label="hybrid over sasrec"),
        model("hybrid", "encoder=[gru4rec,srgnn]", "train.prefixes=8", label="hybrid over gru4rec and srgnn"),
        model("hybrid", "encoder=[gru4rec,sasrec]", label="hybrid over gru4rec and sasrec"),
        Variant("mean of hybrid and hybrid over srgnn", members=("hybrid", "hybrid over srgnn")),
        Variant("mean of hybrid and hybrid over sasrec", members=("hybrid", "hybrid over sasrec")),
        gru4rec_ranker("blend", "blend of gru4rec and counts"),
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
)


def _sensitive(name: str, changes: Mapping[str, tuple[str, ...]]) -> tuple[Variant, ...]:
    return tuple(model(name, *options, label=f"{name}, {change}") for change, options in changes.items())


CHANGES: Mapping[str, tuple[str, ...]] = {
    "embedding size 32": ("network.embedding_dim=32", "network.hidden_size=32"),
    "embedding size 64": ("network.embedding_dim=64", "network.hidden_size=64"),
    "embedding dropout 0": ("network.embedding_dropout=0",),
    "embedding dropout 0.5": ("network.embedding_dropout=0.5",),
    "state dropout 0.5": ("network.state_dropout=0.5",),
    "weight decay 0.001": ("train.weight_decay=0.001",),
    "512 negatives": ("train.negatives=512",),
}
OF_HYBRID: Mapping[str, tuple[str, ...]] = {
    "4 experts": ("network.experts=4",),
    "task weights 1": ("train.task_weights={click:1,like:1,share:1,follow:1}",),
    "task weights 0.1": ("train.task_weights={click:0.1,like:0.1,share:0.1,follow:0.1}",),
}
SENSITIVITY = Experiment(
    "sensitivity",
    "How sensitive are the models to size, regularisation, negatives and task weights?",
    "One option at a time is changed around the recipe.",
    (
        model("gru4rec"),
        HYBRID,
        *_sensitive("gru4rec", CHANGES),
        *_sensitive("hybrid", {**CHANGES, **OF_HYBRID}),
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
    pairs={f"hybrid, {change}": "hybrid" for change in (*CHANGES, *OF_HYBRID)} | {"hybrid": ""},
    seeds=1,
)
LENGTHS = (5, 10, 20, 30)
SESSION_LENGTH = Experiment(
    "session-length",
    "How many clicks of a session are needed?",
    "The last 5 to 30 clicks of each user are retained. The target is always the last click, so the queries stay.",
    tuple(
        Variant(f"{name}, last {length} clicks", (f"model={name}",), protocol=(f"protocol.max_clicks={length}",))
        for name in ("gru4rec", "hybrid")
        for length in reversed(LENGTHS)
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
    pairs={f"hybrid, last {length} clicks": "hybrid, last 30 clicks" for length in LENGTHS[:-1]}
    | {"hybrid, last 30 clicks": ""},
    seeds=1,
)
COUNTS = (10, 30, 100, 300)
NEIGHBOURS = Experiment(
    "neighbours",
    "How many neighbours?",
    "Sessions that V-SkNN and items that ItemKNN go by.",
    tuple(
        Variant(
            f"{name}, {count}",
            GRU4REC.trainer,
            ("blend=none", "baselines=[item_knn,v_sknn]", f"neighbours={count}"),
            ranker=name,
        )
        for name in ("v_sknn", "item_knn")
        for count in COUNTS
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
    pairs={f"item_knn, {count}": "item_knn, 10" for count in COUNTS[1:]} | {"item_knn, 10": ""},
    seeds=1,
)
COLD_START = Experiment(
    "cold-start",
    "Does multi-task learning help short sessions and rare items?",
    "Users with three clicks or more (protocol=cold_start).",
    tuple(
        Variant(f"{name}, cold start", (f"model={name}",), protocol=("protocol=cold_start",))
        for name in ("gru4rec", "hybrid")
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
)
COLD_DATA = Experiment(
    "cold-data",
    "Do a user's clicks in another log help where there are few in this one?",
    "The benchmark's cold start: users of cold_data*.csv, many of whom have one to five clicks on articles and all of "
    "whom are in QK-video too. Models see this log alone, or QK-video's clicks before it (protocol=cold_start both "
    "times). Compared are users with three clicks or more in this log; the target is their last one.",
    tuple(
        Variant(f"{name}, {label}", (f"model={name}",), protocol=("protocol=cold_start",), history=history)
        for name in ("gru4rec", "hybrid")
        for label, history in (("this log alone", False), ("after the other log", True))
    ),
    metrics=("hr@20", "ndcg@20", "hr@10", "ndcg@10"),
    pairs={"hybrid, after the other log": "hybrid, this log alone"},
)
FIRST_ROWS = Experiment(
    "first-rows",
    "What do the first 50,000 rows show?",
    "Only the first 50,000 rows of the log are read.",
    tuple(
        Variant(f"{name}, first 50,000 rows", (f"model={name}",), protocol=("protocol.first_rows=50000",))
        for name in ("gru4rec", "hybrid", "rank_mmoe")
    ),
    metrics=("hr@20", "ndcg@20", *FEEDBACK),
    pairs={"rank_mmoe, first 50,000 rows": ""},
    seeds=1,
)
BENCHMARK_SESSIONS = Experiment(
    "tenrec-code",
    "What do the benchmark's sessions show?",
    "The sessions of the Tenrec benchmark's own script (protocol=tenrec_code): clicked rows alone, items with 2 to "
    "200,000 clicks, the first million users. The model, its tuning and the metrics are this project's.",
    tuple(
        Variant(f"{name}, benchmark's sessions", (f"model={name}",), protocol=("protocol=tenrec_code",))
        for name in ("gru4rec", "srgnn", "sasrec", "nextitnet", "hybrid")
    ),
    published=SESSIONS_PUBLISHED,
)
BENCHMARK_ROWS = Experiment(
    "benchmark-rows",
    "What do the benchmark's multi-task rows show?",
    "The rows of the Tenrec benchmark's click-through file (scenario=ctr): each clicked row with two unclicked ones, "
    "ten history items, a random split by row. A user's rows are in train and in test, so these AUCs are no forecast.",
    tuple(
        Variant(f"{name}, benchmark's rows", (f"model={name}",), scenario="ctr", log=("history=true",))
        for name in ("rank_single", "rank_shared_bottom", "rank_mmoe", "rank_esmm", "rank_ple")
    ),
    metrics=(*(f"auc/{task}" for task in ("click", "like", "share", "follow")), *GAUC),
    flat_rows=True,
    published=ROWS_PUBLISHED,
)
MERLIN_ROWS = Experiment(
    "merlin-rows",
    "What do the rows of NVIDIA Merlin's quick start show?",
    "Rows that were clicked or have no action, of users with 30 to 150 of them and items with 30, counted in five "
    "rounds (python -m etl.merlin). The split is 80/10/10 by row; Merlin's is 80/20 of each user's rows.",
    tuple(
        Variant(
            f"{name}, Merlin's rows",
            (f"model={name}",),
            protocol=("unclicked_per_click=null",),
            scenario="ctr",
            converter="etl.merlin",
        )
        for name in ("rank_single", "rank_shared_bottom", "rank_mmoe", "rank_ple")
    ),
    metrics=(*(f"auc/{task}" for task in ("click", "like", "share", "follow")), *GAUC),
    flat_rows=True,
    published=MERLIN_PUBLISHED,
)
CORRELATIONS = (0.0, 0.5, 1.0)
RELATEDNESS = Experiment(
    "relatedness",
    "Does joint training gain more where tasks are more related?",
    "Generated logs whose tasks share a taste to the degree of task_correlation: MMoE with all tasks against a network "
    "for each. True by construction: the generator decides how related the tasks are.",
    tuple(
        Variant(f"{name}, correlation {value:g}", (f"model={name}",), log=(f"task_correlation={value}",))
        for value in CORRELATIONS
        for name in ("rank_single", "rank_mmoe")
    ),
    metrics=FEEDBACK,
    pairs={f"rank_mmoe, correlation {value:g}": f"rank_single, correlation {value:g}" for value in CORRELATIONS}
    | {f"rank_single, correlation {value:g}": "" for value in CORRELATIONS},
    generated=True,
)
EXPERIMENTS = (
    NEXT_CLICK,
    MULTI_TASK,
    LADDER,
    NEGATIVE_FEEDBACK,
    SEVERAL_ENCODERS,
    SENSITIVITY,
    SESSION_LENGTH,
    NEIGHBOURS,
    COLD_START,
    COLD_DATA,
    FIRST_ROWS,
    BENCHMARK_SESSIONS,
    BENCHMARK_ROWS,
    MERLIN_ROWS,
    RELATEDNESS,
)
"""All experiments, in the order of the site."""


BY_COST = (NEXT_CLICK.name, SEVERAL_ENCODERS.name)
"""Experiments with a chart of accuracy against cost."""
