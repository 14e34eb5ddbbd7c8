"""Environment variables that Ray reads: restored after a block, and the source of the token."""

from __future__ import annotations

import os

import pytest

from etl.runtime.errors import InputError
from trainer.ray_environment import environment, local_ray_environment, token_header


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_environment_block_restores_the_variables(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "before")
    with environment(RAY_ADDRESS=None, RAY_AUTH_MODE="token"):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_ADDRESS"] == "before"
    assert "RAY_AUTH_MODE" not in os.environ


def test_own_ray_has_one_token_per_process_unless_the_user_set_one(monkeypatch):
    first = local_ray_environment()
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert local_ray_environment() == first
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/file")
    assert "RAY_AUTH_TOKEN" not in local_ray_environment()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert local_ray_environment() == {"RAY_AUTH_MODE": "disabled"}


def test_token_is_read_from_the_places_that_ray_reads(monkeypatch, tmp_path):
    assert token_header() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert token_header() == {"Authorization": "Bearer home"}
    (tmp_path / "file").write_text("file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert token_header() == {"Authorization": "Bearer file"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert token_header() == {"Authorization": "Bearer variable"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_header() == {}


def test_unreadable_token_file_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    with pytest.raises(InputError, match="Ray's token in"):
        token_header()
