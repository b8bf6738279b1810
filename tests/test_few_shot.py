"""`calm episodes`: N-way K-shot with sources kept apart, all methods on the same episodes, resumed after a break."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch

from calm_pl.data.episodes import EpisodeStream
from calm_pl.training.comparison import ROWS_FILE
from tests.test_run import calm


@pytest.fixture(scope="module")
def episodes(tones, tiny_lalm, tmp_path_factory):
    out = tmp_path_factory.mktemp("episodes")
    arguments = [
        "episodes", "--data", "folder", "--data.recipe.init_args.data_dir", tones, "--backbone", tiny_lalm,
        "--data.num_workers", 0, "--data.shots", 2, "--way", 2, "--queries", 3, "--count", 5, "--out", out,
    ]  # fmt: skip
    calm(*arguments)
    return out, arguments


def rows_of(out) -> list[dict]:
    return list(csv.DictReader((out / ROWS_FILE).open()))


def test_every_method_meets_every_episode(episodes):
    out, _ = episodes
    rows = rows_of(out)
    methods = {row["method"] for row in rows}
    assert methods >= {"sav", "grw", "calm", "calm_whitened", "calm_learned", "linear_probe"}
    assert sorted((row["method"], row["seed"]) for row in rows) == sorted(
        (m, str(n)) for m in methods for n in range(5)
    )
    assert {row["fold"] for row in rows} == {"2-way"} and {row["shots"] for row in rows} == {"2"}


def test_the_mean_has_its_interval(episodes):
    out, _ = episodes
    accuracies = [float(row["accuracy"]) for row in rows_of(out) if row["method"] == "calm"]
    found = json.loads((out / "comparison.json").read_text())["accuracy"]["calm"]["2"]
    assert found["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert found["half_interval"] == pytest.approx(2.7764 * statistics.stdev(accuracies) / 5**0.5, abs=1e-3)


def test_it_goes_on_where_it_stopped_and_takes_more(episodes, capsys):
    out, arguments = episodes
    whole = (out / ROWS_FILE).read_text()
    lines = whole.splitlines(keepends=True)
    (out / ROWS_FILE).write_text("".join(lines[:8]) + lines[8][:10])
    calm(*arguments)
    accuracies = {(row["method"], row["seed"]): row["accuracy"] for row in rows_of(out)}
    before = {(row["method"], row["seed"]): row["accuracy"] for row in csv.DictReader(lines)}
    assert accuracies == before
    assert "mean over 5 episodes, 2-way" in " ".join(capsys.readouterr().out.split())


def test_another_kind_of_episode_needs_another_folder(episodes):
    _, arguments = episodes
    with pytest.raises(SystemExit, match=r"way 2.*this one is of .*way 3.*--out"):
        calm(*arguments, "--way", 3)


def test_too_few_test_clips_are_told(episodes, tmp_path):
    _, arguments = episodes
    with pytest.raises(SystemExit, match="2 shots and 9 queries need 9 query clips a class"):
        calm(*arguments, "--queries", 9, "--out", tmp_path)


def test_queries_come_from_the_query_clips_alone():
    heads_NKD = torch.arange(40.0).view(40, 1, 1)
    query_N = torch.arange(40) >= 20
    stream = EpisodeStream(heads_NKD, torch.arange(40) % 4, 3, 2, 4, 10, query_N=query_N)
    for episode in stream:
        assert (episode.support_SKD < 20).all() and (episode.queries_QKD >= 20).all()
        assert (episode.support_SKD.flatten() % 4).tolist() == episode.classes.repeat_interleave(2).tolist()
        assert episode.query_labels_Q.bincount().tolist() == [4] * 3
    with pytest.raises(ValueError, match=r"need 6 support clips a class; .*\{0: 5, 1: 5, 2: 5, 3: 5\}"):
        EpisodeStream(heads_NKD, torch.arange(40) % 4, None, 6, 5, query_N=query_N)
    with pytest.raises(ValueError, match="need 3 query clips a class"):
        EpisodeStream(heads_NKD, torch.arange(40) % 4, None, 6, 3, query_N=torch.arange(40) >= 32)
