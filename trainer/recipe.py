"""Recipes: values of options by model and catalogue size (`conf/recipes`), which the command line overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from etl.runtime.errors import InputError
from etl.runtime.options import read_options
from trainer.config import RECIPES, TrainerConfig, check, load

SMALL_CATALOGUE, MEDIUM_CATALOGUE = 100_000, 300_000
"""`recipe=auto` takes `small` and `medium` up to so many items."""

WIDE, WIDE_WARMUP_STEPS = 256, 100
"""Units from which a session model begins with a warm-up, unless `train.warmup_steps` is set, and its steps."""


def with_recipe(options: Sequence[str], n_items: int, asked: TrainerConfig | None = None) -> TrainerConfig:
    """The configuration with its recipe's values; options of the command line win.

    Wide session models get a warm-up: at the recipes' rates 256 units and more diverge in their first steps.

    Args:
        options: the command line.
        n_items: size of the catalogue, which `recipe=auto` goes by; it takes the size's first recipe here.
        asked: what `load(options)` returned, if it has been called: composing it again takes a tenth of a second.
    """
    config = asked or load(options)
    recipe = catalogue_size(n_items) if config.recipe == "auto" else config.recipe
    preset = f"+recipes@_global_={recipe_file(recipe, config.recipe_model)}"
    config = read_options(TrainerConfig, "trainer.conf", options, [preset])
    config.recipe = recipe
    explicit = {option.partition("=")[0] for option in options}
    slow = config.train.learning_rate < TrainerConfig().train.learning_rate
    if config.network.item_features and slow and config.train.ppmi_start and "train.ppmi_start" not in explicit:
        _begin_at_random(config, explicit)
    wide = max(config.network.embedding_dim, config.network.hidden_size) >= WIDE
    if wide and not config.ranks and "train.warmup_steps" not in explicit:
        config.train.warmup_steps = max(config.train.warmup_steps, WIDE_WARMUP_STEPS)
    if config.ranks:
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
    """The recipe that is first for a catalogue of so many items."""
    return "small" if n_items <= SMALL_CATALOGUE else "medium" if n_items <= MEDIUM_CATALOGUE else "large"


def recipes_to_try(config: TrainerConfig, n_items: int) -> list[str]:
    """What `recipe=auto` chooses from: `auto.candidates`, else the recipes of the model for the catalogue's size."""
    if config.auto.candidates:
        return config.auto.candidates
    size = catalogue_size(n_items)
    return [size, *(n for n in RECIPES if n.startswith(f"{size}_") and _has_file(n, config.recipe_model))]


def recipe_file(recipe: str, model: str) -> str:
    """Name of the file of a recipe, or where the model has none, of that of the size or of the next smaller one.

    >>> recipe_file("medium", "gru4rec"), recipe_file("small_softmax", "nextitnet")
    ('medium_gru4rec', 'small_nextitnet')
    """
    sizes = ("large", "medium", "small")
    names = [recipe, *sizes[sizes.index(recipe.partition("_")[0]) :]]
    return f"{next((name for name in names if _has_file(name, model)), names[-1])}_{model}"


def _has_file(recipe: str, model: str) -> bool:
    return (files("trainer.conf.recipes") / f"{recipe}_{model}.yaml").is_file()


def _begin_at_random(config: TrainerConfig, explicit: set[str]) -> None:
    """Take back what a recipe sets for vectors from co-occurrence that are learned on slowly.

    Features must learn what items have in common: at a low rate they do not within a recipe's epochs.
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
