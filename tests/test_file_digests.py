from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from calm_pl.headstore import digests, file_digest, file_digests


def old_file() -> Path:
    """A file that has rested long enough for its hash to be remembered."""
    return Path(os.__file__)


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    root = tmp_path / "not there" / "before the first run"
    digest = file_digest(old_file(), root)
    (memory,) = (root / "digests").iterdir()
    memory.write_text(memory.read_text().replace(digest, "remembered"))
    assert file_digest(old_file(), root) == "remembered"
    link = tmp_path / "link.py"
    link.symlink_to(old_file())
    assert file_digest(link, root) == "remembered"


@pytest.mark.parametrize("field", [0, 1, 2], ids=["size", "modified", "changed"])
def test_any_difference_of_size_or_times_reads_the_file_again(tmp_path: Path, field: int) -> None:
    digest = file_digest(old_file(), tmp_path)
    (memory,) = (tmp_path / "digests").iterdir()
    ((path, entry),) = json.loads(memory.read_text()).items()
    entry[field] += 1
    memory.write_text(json.dumps({path: [*entry[:3], "remembered"]}))
    assert file_digest(old_file(), tmp_path) == digest


def test_a_file_replaced_at_equal_size_and_time_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_pl.headstore.digests.SETTLED_NS", 0)
    path = tmp_path / "new.wav"
    path.write_bytes(b"one")
    time.sleep(0.02)  # a few ticks of the file system's clock
    first = file_digest(path, tmp_path)
    assert file_digest(path, tmp_path) == first
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path, tmp_path) != first


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "new.wav"
    path.write_bytes(b"one")
    file_digest(path, tmp_path)
    assert not (tmp_path / "digests").exists()


def hashed_before(change: Callable[[], object]) -> Callable[[str], str]:
    """Hashing, at the end of which somebody has changed the file."""
    hashed = digests._sha256

    def overtaken(file: str) -> str:
        digest = hashed(file)
        change()
        return digest

    return overtaken


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    path = tmp_path / "new.wav"
    path.write_bytes(b"one")
    time.sleep(0.02)  # a few ticks of the file system's clock
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_sha256", hashed_before(lambda: path.write_bytes(b"two, and longer")))
        assert file_digest(path, tmp_path) == hashlib.sha256(b"one").hexdigest()
    assert not (tmp_path / "digests").exists()
    assert file_digest(path, tmp_path) == hashlib.sha256(b"two, and longer").hexdigest()


def test_a_file_that_changes_within_one_tick_is_not_remembered_however_long_reading_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 50_000_000)
    path = tmp_path / "new.wav"
    path.write_bytes(b"one")
    stamp = digests._stamp(str(path))
    hashed = digests._sha256

    def change() -> None:
        path.write_bytes(b"two")
        time.sleep(0.1)

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_stamp", lambda _: stamp)  # of a file system whose clock stood still meanwhile
        patch.setattr(digests, "_sha256", hashed_before(change))
        assert file_digest(path, tmp_path) == hashlib.sha256(b"one").hexdigest()
        patch.setattr(digests, "_sha256", hashed)
        assert file_digest(path, tmp_path) == hashlib.sha256(b"two").hexdigest()


def test_a_torn_memory_is_forgotten(tmp_path: Path) -> None:
    digest = file_digest(old_file(), tmp_path)
    (memory,) = (tmp_path / "digests").iterdir()
    memory.write_bytes(memory.read_bytes()[:-9])
    assert file_digest(old_file(), tmp_path) == digest


def test_a_file_that_is_called_like_a_hash_is_read_all_the_same(tmp_path: Path) -> None:
    """A blob of the hub's cache is, until somebody copies other weights through the link that leads to it."""
    blob = tmp_path / "models--a--b" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"weights")
    assert file_digest(blob, tmp_path / "heads") == hashlib.sha256(b"weights").hexdigest()


def test_many_files_show_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("calm_pl.headstore.digests.PART", 2)
    files = [tmp_path / f"{index}.wav" for index in range(5)]
    for file in files:
        file.write_text(file.name)
    found = file_digests(files, tmp_path)
    assert "looking at files: 5 files" in capsys.readouterr().err
    assert found == [file_digest(file, tmp_path) for file in files]
    monkeypatch.setenv("LOCAL_RANK", "1")
    file_digests(files, tmp_path)
    assert not capsys.readouterr().err


def test_what_was_hashed_before_an_interruption_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "PART", 1)
    monkeypatch.setattr(digests, "SAVE_EVERY_SECONDS", 0)
    with pytest.raises(FileNotFoundError, match="gone"):
        file_digests([old_file(), tmp_path / "gone.wav"], tmp_path)
    (memory,) = (tmp_path / "digests").iterdir()
    assert str(old_file()) in memory.read_text()
