from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from calm_pl.commands.store import main
from calm_pl.headstore import HeadStore

DAY = 24 * 3600


def make_store(root: Path, backbone: str, days_unused: float, clips: int = 10) -> HeadStore:
    store = HeadStore({"backbone": backbone, "files": backbone}, root)
    for index in range(clips):
        store.write([str(index)], torch.ones(1, 4, 64))
    used = time.time() - days_unused * DAY
    os.utime(store.folder / "key.json", (used, used))
    return store


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, HeadStore]:
    ages = {"fresh": 0.1, "stale": 20.0, "ancient": 90.0}
    return {name: make_store(tmp_path, name, days) for name, days in ages.items()}


def left(stores: dict[str, HeadStore]) -> set[str]:
    return {name for name, store in stores.items() if store.folder.exists()}


def run(root: Path, *arguments: str) -> int:
    return main([*arguments, "--root", str(root)])


def test_ls_shows_the_last_used_first(
    tmp_path: Path, stores: dict[str, HeadStore], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = stores["ancient"].folder / "key.json"
    broken.write_text("{")
    os.utime(broken, (0, 0))
    (tmp_path / "digests").mkdir()
    assert run(tmp_path, "ls") == 0
    output = capsys.readouterr().out
    assert output.index("fresh") < output.index("stale") < output.index("unreadable")
    assert "3 stores" in output
    assert f"{broken} cannot be read" in output


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "new", "ls") == 0
    assert "0 stores" in capsys.readouterr().out


def test_verify_finds_damage(tmp_path: Path, stores: dict[str, HeadStore], capsys: pytest.CaptureFixture[str]) -> None:
    HeadStore({"backbone": "empty"}, tmp_path).prepare()
    assert run(tmp_path, "verify") == 0
    shard = next(stores["stale"].folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=shard.name):
        assert run(tmp_path, "verify") == 1
    assert f"{stores['stale'].folder.name}: 9 clips sound, 1 corrupt files" in capsys.readouterr().out


def test_prune_alone_tidies_and_deletes_no_store(tmp_path: Path, stores: dict[str, HeadStore]) -> None:
    folder = stores["fresh"].folder
    (folder / "1-a.safetensors.corrupt").write_bytes(b"x")
    (folder / ".tmp-of-a-killed-writer").write_bytes(b"x")
    os.utime(folder / ".tmp-of-a-killed-writer", (0, 0))
    assert run(tmp_path, "prune") == 0
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    assert left(stores) == {"fresh", "stale", "ancient"}
    assert len(HeadStore.open(folder)) == 10


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--older-than", "30"], {"fresh", "stale"}),
        (["--older-than", "10"], {"fresh"}),
        (["--max-size", "0"], set()),
        (["--max-size", "1G"], {"fresh", "stale", "ancient"}),
    ],
)
def test_prune_by_age_and_size(
    tmp_path: Path, stores: dict[str, HeadStore], options: list[str], kept: set[str]
) -> None:
    assert run(tmp_path, "prune", "--yes", *options) == 0
    assert left(stores) == kept


def test_prune_to_a_size_takes_the_least_recently_used(tmp_path: Path, stores: dict[str, HeadStore]) -> None:
    assert run(tmp_path, "prune") == 0
    sizes = [sum(path.stat().st_size for path in store.folder.iterdir()) for store in stores.values()]
    assert run(tmp_path, "prune", "--yes", "--max-size", str(sizes[0] + sizes[1])) == 0
    assert left(stores) == {"fresh", "stale"}


@pytest.mark.parametrize(("answer", "kept"), [("n\n", {"fresh", "stale", "ancient"}), ("y\n", {"fresh", "ancient"})])
def test_prune_by_key_asks_first(
    tmp_path: Path,
    stores: dict[str, HeadStore],
    answer: str,
    kept: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    status = run(tmp_path, "prune", "--key", stores["stale"].folder.name[:12])
    assert status == (1 if answer == "n\n" else 0)
    assert left(stores) == kept


def test_prune_without_anybody_to_ask_deletes_nothing(
    tmp_path: Path, stores: dict[str, HeadStore], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = left(stores)
    assert run(tmp_path, "prune", "--key", stores["stale"].folder.name[:12]) == 1
    assert "--yes deletes without asking" in capsys.readouterr().err and left(stores) == before


@pytest.mark.parametrize("option", [["--key", ""], ["--older-than", "-1"], ["--older-than", "nan"]])
def test_prune_refuses_what_would_name_every_store_or_none(
    tmp_path: Path, stores: dict[str, HeadStore], option: list[str]
) -> None:
    before = left(stores)
    with pytest.raises(SystemExit):
        run(tmp_path, "prune", "--yes", *option)
    assert left(stores) == before


def test_prune_names_stores_that_it_may_not_write_to(
    tmp_path: Path,
    stores: dict[str, HeadStore],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ancient, may = stores["ancient"].folder, os.access
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != ancient and may(path, mode))
    assert run(tmp_path, "prune", "--yes", "--older-than", "10") == 1
    output = capsys.readouterr().out
    assert left(stores) == {"fresh", "ancient"} and "1 stores deleted, 1 tidied" in output
    assert f"{ancient} is left as it is: you may not write to it" in output


def test_prune_leaves_foreign_folders_alone(tmp_path: Path, stores: dict[str, HeadStore]) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    assert run(tmp_path, "prune", "--yes", "--max-size", "0") == 0
    assert foreign.exists()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from calm_pl.commands.store import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_size_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "prune", "--max-size", "lots")
    assert "'lots' is not a size" in capsys.readouterr().err
