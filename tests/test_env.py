"""Environment variables: defaults, bad values, misspelt names."""

import re
from pathlib import Path

import pytest

from tilewright.compiler import env
from tilewright.compiler.errors import UserError
from tilewright.compiler.targets import host


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*env.NAMES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    env.check()
    assert env.cache_dir() == tmp_path / ".cache" / "tilewright"
    assert env.threads() == env.jobs() == host.cores()
    assert env.debug() is False


def test_values_are_taken(monkeypatch, tmp_path):
    monkeypatch.setenv(env.CACHE_DIR, str(tmp_path / "new"))
    monkeypatch.setenv(env.THREADS, "3")
    monkeypatch.setenv(env.JOBS, "5")
    monkeypatch.setenv(env.DEBUG, "1")
    assert env.cache_dir() == tmp_path / "new"
    assert (env.threads(), env.jobs(), env.debug()) == (3, 5, True)


@pytest.mark.parametrize(("base", "used"), [("/somewhere", True), ("relative", False), ("", False)])
def test_cache_base_directory(monkeypatch, tmp_path, base, used):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert env.cache_dir() == (Path(base) if used else tmp_path / ".cache") / "tilewright"


@pytest.mark.parametrize("name", [env.THREADS, env.JOBS])
@pytest.mark.parametrize("value", ["", "0", "-1", "two", "1.5", "1025", "²", " 2"])
def test_bad_counts(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(f"{name}={value!r}") + ".*from 1 to 1024"):
        env.check()


@pytest.mark.parametrize("value", ["", "true", "2"])
def test_bad_debug(monkeypatch, value):
    monkeypatch.setenv(env.DEBUG, value)
    with pytest.raises(UserError, match="neither 0 nor 1"):
        env.check()


def test_bad_cache_directory(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for value in (str(file), "", "~nobody-of-that-name/x"):
        monkeypatch.setenv(env.CACHE_DIR, value)
        with pytest.raises(UserError, match="not a directory"):
            env.check()


@pytest.mark.parametrize(
    ("name", "hint"), [("TILEWRIGHT_THREAD", "did you mean TILEWRIGHT_THREADS"), ("TILEWRIGHT_QZXV", "known are")]
)
def test_misspelt_names(monkeypatch, name, hint):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"unknown environment variable {name}; {hint}"):
        env.check()


def test_the_document_names_every_variable():
    assert set(re.findall(r"^\| (TILEWRIGHT_\w+)", env.__doc__ or "", re.M)) == set(env.NAMES)


def test_only_env_reads_the_environment():
    """Every TILEWRIGHT_ variable goes through this one file."""
    root = Path(env.__file__).parents[1]
    folders = ("compiler", "passes", "schedules", "models", "runtime", "tilewright")
    files = [f for folder in folders for f in (root / folder).rglob("*.py") if f != Path(env.__file__)]
    readers = [str(f.relative_to(root)) for f in files if re.search(r"(environ|getenv).*TILEWRIGHT_", f.read_text())]
    assert files and readers == []
