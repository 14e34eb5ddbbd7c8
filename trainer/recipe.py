"""Recipes: option values by model and catalogue size (`conf/recipes`), overridden by the command line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from etl.runtime.errors import InputError
from etl.runtime.options import read_options
from trainer.config import RECIPES, TrainerConfig, check, load

SMALL_CATALOGUE, MEDIUM_CATALOGUE = 100_000, 300_000
"""Largest catalogues (items) for which `recipe=auto` takes `small` and `medium`."""

WIDE, WIDE_WARMUP_STEPS = 256, 100
"""Hidden size from which session models get a warm-up, and its steps, unless `train.warmup_steps` is set."""


def with_recipe(options: Sequence[str], n_items: int, loaded_config: TrainerConfig | None = None) -> TrainerConfig:
    """Apply the recipe; options of the command line take precedence.

    `recipe` of the result is the recipe whose values were taken, which is the next smaller size's if the model has none
    of that name. Wide session models get a warm-up: at the recipes' learning rates 256 units and more diverge at first.

    Args:
        options: the command line.
        n_items: catalogue size; `recipe=auto` takes the first recipe of that size here.
        loaded_config: the result of `load(options)`, if already called: composing it again takes a tenth of a second.
    """
    config = loaded_config or load(options)
    recipe = catalogue_size(n_items) if config.recipe == "auto" else config.recipe
    file = recipe_file(recipe, config.recipe_model)
    config = read_options(TrainerConfig, "trainer.conf", options, [f"+recipes@_global_={file}"])
    config.recipe = file.removesuffix(f"_{config.recipe_model}")
    explicit = {option.partition("=")[0] for option in options}
    slow = config.train.learning_rate < TrainerConfig().train.learning_rate
    if config.network.item_features and slow and config.train.ppmi_start and "train.ppmi_start" not in explicit:
        _begin_at_random(config, explicit)
    wide = max(config.network.embedding_dim, config.network.hidden_size) >= WIDE
    if wide and not config.is_ranking_model and "train.warmup_steps" not in explicit:
        config.train.warmup_steps = max(config.train.warmup_steps, WIDE_WARMUP_STEPS)
    if config.is_ranking_model:
        config.tasks = config.feedback_tasks
    elif config.model != "hybrid":
        config.tasks = ["next"]
    check(config)
    reads = config.has_feedback_towers and config.network.feedback_feature_dim
    for name in ("feedback_features", "feedback_actions"):
        if getattr(config.network, name) and f"network.{name}" in explicit and not reads:
            expected = "a hybrid with feedback tasks and network.feedback_feature_dim above 0"
            raise InputError(f"{expected} for network.{name}", getattr(config.network, name), "leave it out")
    return config


def catalogue_size(n_items: int) -> str:
    """The default recipe for a catalogue of `n_items` items."""
    return "small" if n_items <= SMALL_CATALOGUE else "medium" if n_items <= MEDIUM_CATALOGUE else "large"


def recipes_to_try(config: TrainerConfig, n_items: int) -> list[str]:
    """The candidates of `recipe=auto`: `auto.candidates`, else the model's recipes for the catalogue size."""
    if config.auto.candidates:
        return config.auto.candidates
    size = catalogue_size(n_items)
    return [size, *(n for n in RECIPES if n.startswith(f"{size}_") and _has_file(n, config.recipe_model))]


def recipe_file(recipe: str, model: str) -> str:
    """File name of a recipe; if the model has none, that of the size or of the next smaller size.

    >>> recipe_file("medium", "gru4rec"), recipe_file("small_softmax", "nextitnet")
    ('medium_gru4rec', 'small_nextitnet')
    """
    sizes = ("large", "medium", "small")
    names = [recipe, *sizes[sizes.index(recipe.partition("_")[0]) :]]
    return f"{next((name for name in names if _has_file(name, model)), names[-1])}_{model}"


def _has_file(recipe: str, model: str) -> bool:
    return (files("trainer.conf.recipes") / f"{recipe}_{model}.yaml").is_file()


def _begin_at_random(config: TrainerConfig, explicit: set[str]) -> None:
    """Undo recipe values meant for fine-tuning vectors initialised from co-occurrence.

    Feature embeddings must be learned from scratch, which a low learning rate does not do within a recipe's epochs.
    """
    plain = TrainerConfig()
    config.train.ppmi_start = 0.0
    for section, name in (
        ("train", "learning_rate"),
        ("train", "warmup_steps"),
        ("network", "embedding_dropout"),
        ("network", "state_dropout"),
    ):
        if f"{section}.{name}" not in explicit:
            setattr(getattr(config, section), name, getattr(getattr(plain, section), name))
