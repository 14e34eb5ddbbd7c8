"""Which Java Spark would start, and the error for one that it cannot use."""

import pytest

from etl.engines.java import find_java, java_version, require_java
from etl.runtime.errors import InputError


def java_home(folder, script: str):
    """A JAVA_HOME whose `java` is a shell script."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("line", "version"),
    [('openjdk version "17.0.19" 2026-04-21', 17), ('java version "1.8.0_402"', 8), ('openjdk version "25" 2025', 25)],
)
def test_java_major_version_is_parsed(tmp_path, monkeypatch, line, version):
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path, f"echo '{line}' >&2")))
    assert java_version() == version


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'java version \"1.8.0_402\"' >&2", "Java 8"),
        ("echo 'Error: could not find libjava.so' >&2; exit 2", "Error: could not find libjava.so"),
        ("exit 0", "no version"),
    ],
)
def test_unusable_java_is_reported_with_its_path_and_output(tmp_path, monkeypatch, script, said):
    monkeypatch.setenv("JAVA_HOME", str(java_home(tmp_path, script)))
    with pytest.raises(InputError) as refused:
        require_java()
    assert said in refused.value.got
    assert f"{tmp_path}/bin/java of JAVA_HOME" in refused.value.got


def test_java_home_without_java_and_missing_java_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(InputError, match="No such file or directory"):
        require_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java().path is None
    with pytest.raises(InputError, match="got none"):
        require_java()
