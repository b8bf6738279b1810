"""Batches of an extraction are planned once, so that a killed one goes on with the same."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from calm_pl.headstore import HeadStore
from calm_pl.headstore.plans import KEPT
from tests.test_headstore import KEY, heads, no_silent_warnings

__all__ = ["no_silent_warnings"]  # holds here, too


def plan(store: HeadStore, keys: list[str], batch_size: int = 2) -> list[list[str]]:
    def split(rows: list[int]) -> list[list[int]]:
        return [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]

    store.folder.mkdir(parents=True, exist_ok=True)
    batches = store.planned_batches(keys, store.missing(keys), batch_size, split)
    return [[keys[index] for index in batch] for batch in batches]


def plan_files(store: HeadStore) -> list[Path]:
    return sorted(store.folder.glob("plan-*.json"))


def test_batches_that_were_planned_are_taken_whole_until_all_of_the_plan_is_held(tmp_path: Path) -> None:
    store, other = HeadStore(KEY, tmp_path), HeadStore(KEY, tmp_path)
    assert plan(store, list("abcde")) == [["a", "b"], ["c", "d"], ["e"]]
    assert plan(other, list("ba")) == [["a", "b"]]
    store.write(["a", "b", "d"], heads(3))
    assert plan(other, list("edcba")) == [["c", "d"], ["e"]]  # whatever the order
    assert plan(other, list("eca")) == [["e"], ["c"]]  # d is not here
    assert plan(other, list("xcda")) == [["c", "d"], ["x"]]
    assert plan(other, list("abcde"), batch_size=3) == [["c", "e"]]
    assert plan(other, list("ab")) == []
    store.write(["c", "e"], heads(2))
    (store.folder / "plan-0.json").symlink_to("gone")  # as one that another run deletes at this moment
    assert plan(store, ["x", "y"]) == [["x"], ["y"]]
    assert len(plan_files(store)) == 3  # of x, of y, and that which is gone


def test_plans_that_are_never_finished_do_not_gather(tmp_path: Path) -> None:
    store = HeadStore(KEY, tmp_path)
    for index in range(KEPT + 10):
        plan(store, [str(index)])
    assert len(plan_files(store)) == KEPT + 1
    assert plan(store, ["73", "x"]) == [["73"], ["x"]]


def test_plans_that_may_not_be_deleted_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "another user's, in a folder with the sticky bit")

    store = HeadStore(KEY, tmp_path)
    plan(store, ["a"])
    store.write(["a"], heads(1))
    monkeypatch.setattr(Path, "unlink", lambda path, **_: refuse() if path.name.startswith("plan-") else None)
    assert plan(store, ["a", "b"]) == [["b"]]


def test_a_folder_that_takes_no_plan_is_planned_for_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr("calm_pl.headstore.plans.write_atomically", refuse)
    monkeypatch.setattr("calm_pl.headstore.store.write_atomically", refuse)
    assert plan(HeadStore(KEY, tmp_path), ["a", "b", "c"]) == [["a", "b"], ["c"]]
