"""`@FILE`: options from a YAML file."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.config import load
from etl.runtime.errors import InputError
from etl.runtime.option_files import expand_files
from etl.twin.__main__ import main
from trainer.config import load as load_trainer


def test_option_file_expands_in_place_and_later_options_win(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("protocol:\n  max_clicks: 20\nscenario: qb_video\nexposures: false\ninput: [a.csv, 'b, c.csv']\n")
    options = expand_files(["output=o", f"@{path}", "protocol.max_clicks=7"])
    assert options[0] == "output=o"
    config = load(options)
    assert (config.protocol.max_clicks, config.scenario, config.exposures) == (7, "qb_video", False)


@given(
    units=st.integers(1, 512),
    rate=st.floats(1e-6, 10.0),
    flag=st.booleans(),
    weights=st.dictionaries(st.sampled_from(["click", "like"]), st.floats(0.1, 3.0), min_size=1),
)
@settings(max_examples=20)
def test_values_survive_a_yaml_round_trip(tmp_path_factory, units, rate, flag, weights):
    path = tmp_path_factory.mktemp("f") / "f.yaml"
    values = {"train.learning_rate": rate, "train": {"exposures": flag, "task_weights": weights}}
    path.write_text(yaml.safe_dump(values | {"network.embedding_dim": units, "network.cosine_temperature": None}))
    config = load_trainer(expand_files(["data=d", "output=o", "model=hybrid", f"@{path}"]))
    assert config.network.embedding_dim == units
    assert config.train.learning_rate == rate
    assert config.train.exposures == flag
    assert config.network.cosine_temperature is None
    assert {name: config.train.task_weights[name] for name in weights} == weights


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n${}~"), min_size=1), min_size=2))
@settings(max_examples=200)
def test_lists_of_texts_with_any_characters_survive_a_yaml_round_trip(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("f") / "f.yaml"
    path.write_text(yaml.safe_dump({"input": [f"x{text}" for text in texts]}))
    assert load(["output=o", "scenario=qb_video", *expand_files([f"@{path}"])]).input == [f"x{text}" for text in texts]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a readable YAML file of options, got"),
        ("a: [", "expected a readable YAML file of options, got"),
        ("- a", "expected a YAML map of options, got"),
        ("usres: 3", "did you mean users?"),
        ("users: many", "expected an integer for users, got"),
    ],
)
def test_invalid_option_files_fail_with_a_one_line_error(tmp_path, text, message, capfd):
    path = tmp_path / "f.yaml"
    if text is not None:
        path.write_text(text)
    assert main([f"output={tmp_path / 'log.csv'}", "scenario=qb_video", "users=3", f"@{path}"]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_missing_option_file_is_reported():
    with pytest.raises(InputError, match=r"/nowhere/best\.yaml: No such file"):
        expand_files(["@/nowhere/best.yaml"])
