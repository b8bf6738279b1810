"""`calm compare`: rows, resuming, folds kept apart, and the table that comes of it."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

from calm_pl import cli
from calm_pl.baselines import SAV
from calm_pl.clip import Clip
from calm_pl.conf import find_config
from calm_pl.data import read_manifest, write_manifest
from calm_pl.data.recipes import Manifest
from calm_pl.methods.compare import Fold, Row
from calm_pl.methods.compare import compare as compare_methods
from calm_pl.report.methods import means, report
from calm_pl.training.comparison import ROWS_FILE, clips_and_folds, read_rows


def compare(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["calm", "compare", *map(str, arguments)])
        assert cli.main() == 0


@pytest.fixture(scope="module")
def compared(tones, tiny_lalm, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    arguments = [
        "--data", "folder", "--data.recipe.init_args.data_dir", tones, "--backbone", tiny_lalm,
        "--data.num_workers", 0, "--shots", "1,2", "--seeds", 3, "--out", out,
    ]  # fmt: skip
    compare(*arguments)
    return out, arguments


def test_one_row_per_method_shots_seed_and_fold(compared):
    out, _ = compared
    rows = list(csv.DictReader((out / ROWS_FILE).open()))
    assert list(rows[0])[:5] == ["method", "shots", "seed", "fold", "accuracy"]
    keys = {(row["method"], row["shots"], row["seed"], row["fold"]) for row in rows}
    methods = {row["method"] for row in rows}
    assert len(rows) == len(keys) == len(methods) * 2 * 3
    assert methods >= {"sav", "grw", "calm", "calm_whitened", "calm_learned", "linear_probe"}


def test_table_and_plot_lie_beside_the_rows(compared):
    out, _ = compared
    result = json.loads((out / "comparison.json").read_text())
    assert result["accuracy"].keys() >= {"sav", "calm"} and {"1", "2"} == result["accuracy"]["sav"].keys()
    assert {d["reference"] for d in result["differences"]} == {"calm"}
    assert (out / "accuracy-over-shots.png").stat().st_size > 5_000
    assert (out / "accuracy-over-shots.svg").read_text().lstrip().startswith("<?xml")


def test_an_interrupted_comparison_goes_on(compared, capsys):
    out, arguments = compared
    file = out / ROWS_FILE
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:10]) + lines[10][: len(lines[10]) // 2])  # killed within a line
    compare(*arguments)
    again = {row.key: row.accuracy for row in read_rows(file)}
    before = {tuple(line.split(",")[:4]): float(line.split(",")[4]) for line in lines[1:]}
    assert {tuple(map(str, key)): value for key, value in again.items()} == before


def test_fewer_seeds_leave_the_others_out_of_the_table(compared, tmp_path):
    out, arguments = compared
    copy = shutil.copytree(out, tmp_path / "copy")
    rows = (copy / ROWS_FILE).read_text()
    compare(*arguments, "--out", copy, "--seeds", 1)
    table = json.loads((copy / "comparison.json").read_text())["accuracy"]["calm"]["2"]
    of_seed_0 = [
        row.accuracy for row in read_rows(copy / ROWS_FILE) if (row.method, row.shots, row.seed) == ("calm", 2, 0)
    ]
    assert table["mean"] == pytest.approx(sum(of_seed_0) / len(of_seed_0)) and table["half_interval"] is None
    assert (copy / ROWS_FILE).read_text() == rows


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("--data.protocol", "mcq", "--data.num_options", 2), "protocol open.*; this one is of .*protocol mcq.*--out"),
        (("--data.backbone.heads", "encoder"), "heads decoder; this one is of heads encoder: .*--out"),
        (("--data.recipe.init_args.test_fraction", 0.5), r"recipe.test_fraction 0.3; .* recipe.test_fraction 0.5"),
        (("--model.methods.calm.init_args.tau", 0.2), r"methods.calm.init_args.tau None; .*.tau 0.2"),
    ],
)  # fmt: skip
def test_rows_of_another_question_never_join(compared, other, message):
    out, arguments = compared
    before = (out / ROWS_FILE).read_text()
    with pytest.raises(SystemExit, match=message):
        compare(*arguments, *other)
    assert (out / ROWS_FILE).read_text() == before


@pytest.mark.parametrize("command", ["compare", "episodes"])
@pytest.mark.parametrize(
    "option",
    [
        ("--data.pseudo_labels", "labels.jsonl"),
        ("--data.by_confidence", "true"),
        ("--data.unlabelled", "sounds"),
        ("--data.protocol", "mcq", "--data.within_options", "true"),
        ("--model.zero_shot", "true"),
        ("--model.zero_shot=true",),
        ("--model.zero_shot_by", "generation"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tiny_lalm, tmp_path, command, option):
    name = option[-2:][0].partition("=")[0]
    with pytest.raises(SystemExit, match=rf"{name}.* does not count here.*calm sweep shots"):
        cli.main([command, "--backbone", str(tiny_lalm), *option, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (("--data.seed", "3"), "--data.seed is called --seeds"),
        (("--data.shots=2",), "--data.shots is called --shots"),
        (("--trainer.precision", "bf16-true"), "--trainer.precision is called --precision"),
    ],
)
def test_options_of_fit_that_have_another_name_here_are_told(option, name):
    with pytest.raises(SystemExit, match=f"{name} .*here"):
        cli.main(["compare", *option])


def test_methods_may_join_later(compared, tmp_path):
    out, arguments = compared
    copied = Path(shutil.copytree(out, tmp_path / "copy"))
    before = read_rows(out / ROWS_FILE)
    model = yaml.safe_load(find_config("model", "default").read_text())
    model["methods"] = {"again": {"class_path": "calm_pl.baselines.SAV", "init_args": {"num_heads": 2}}}
    model["classifier"] = "again"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(model))
    for given in (tmp_path / "again.yaml", "default"):
        compare(*arguments[:-1], copied, "--model", given)
        rows = read_rows(copied / ROWS_FILE)
        assert rows[: len(before)] == before and {row.method for row in rows[len(before) :]} == {"again"}


@dataclass
class Folded:
    test_fold: int = 1
    num_folds = 3
    name = "folded"
    leak = False

    def clips(self) -> list[Clip]:
        return [
            Clip(
                f"/{n}.wav",
                "ab"[n % 2],
                "test" if n % 3 + 1 == self.test_fold else "train",
                group="g" if self.leak else str(n),
            )
            for n in range(12)
        ]


def test_folds_are_those_of_the_data_set():
    clips, folds = clips_and_folds(Folded())
    assert [fold.name for fold in folds] == ["1", "2", "3"]
    for number, fold in enumerate(folds):
        assert all(int(clips[i].audio[1:-4]) % 3 == number for i in fold.test.tolist())
        assert sorted(fold.train.tolist() + fold.test.tolist()) == list(range(12))


def test_folds_that_share_a_source_are_refused():
    @dataclass
    class Leaky(Folded):
        leak = True

    with pytest.raises(ValueError, match="1 groups are in training and in test"):
        clips_and_folds(Leaky())


def test_data_without_folds_is_split_at_random_as_often_as_asked(tmp_path):
    lines = ["audio,label,group", *(f"{n}.wav,{'ab'[n % 2]},{n // 2}" for n in range(40))]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    recipe = Manifest(str(tmp_path / "clips.csv"), seed=5)
    clips, folds = clips_and_folds(recipe, splits=3)
    assert [fold.name for fold in folds] == ["5", "6", "7"]
    assert len({tuple(fold.test.tolist()) for fold in folds}) == 3
    for fold in folds:
        groups = [{clips[i].group for i in side.tolist()} for side in (fold.train, fold.test)]
        assert not groups[0] & groups[1] and len(groups[1]) == 6
    assert torch.equal(clips_and_folds(recipe)[1][0].test, folds[0].test)


def test_splits_that_the_data_fix_are_not_drawn_anew(tmp_path):
    lines = ["audio,label,split", *(f"{n}.wav,a,{'test' if n % 3 else 'train'}" for n in range(9))]
    (tmp_path / "clips.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="manifest comes with a split of its own"):
        clips_and_folds(Manifest(str(tmp_path / "clips.csv")), splits=2)
    with pytest.raises(ValueError, match="folded comes with 3 folds of its own.*--splits 2"):
        clips_and_folds(Folded(), splits=2)


def test_means_take_a_seed_as_one_observation():
    rows = [Row("calm", 1, seed, fold, value, 0, 0, 0, 0, 0) for seed, fold, value in
            [(0, "1", 0.2), (0, "2", 0.4), (1, "1", 0.5), (1, "2", 0.7), (2, "1", 0.9), (2, "2", 0.9)]]  # fmt: skip
    mean, half = means(rows)["calm"][1]
    assert mean == pytest.approx((0.3 + 0.6 + 0.9) / 3)
    assert half == pytest.approx(4.303 * 0.3 / 3**0.5, rel=0.02)  # Student's t with 2 degrees of freedom


def test_two_seeds_have_means_without_intervals(tmp_path, capsys):
    rows = [Row(method, 1, seed, "1", accuracy + seed / 10, 0, 0, 0, 0, 0)
            for method, accuracy in [("calm", 0.5), ("sav", 0.3)] for seed in range(2)]  # fmt: skip
    report(rows, tmp_path)
    shown = capsys.readouterr().out
    assert "55.0" in shown and "35.0" in shown and "-20.0" in shown and "nan" not in shown


def test_shots_and_seeds_that_repeat_count_once():
    fold = Fold("1", torch.arange(8), torch.arange(8, 12))
    rows = compare_methods(
        torch.randn(12, 2, 4), torch.arange(12) % 2, 2, [fold], [2, 2, 1], [0, 0],
        {"sav": SAV}, lambda pool, shots, seed: range(2 * shots),
    )  # fmt: skip
    assert [row.key for row in rows] == [("sav", 2, 0, "1"), ("sav", 1, 0, "1")]


def test_rows_that_stand_twice_in_a_file_are_read_once(compared, tmp_path):
    lines = (compared[0] / ROWS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / ROWS_FILE).write_text("".join([*lines, *lines[1:5]]))
    assert read_rows(tmp_path / ROWS_FILE) == read_rows(compared[0] / ROWS_FILE)


def test_methods_of_fewer_draws_are_marked(tmp_path, capsys):
    rows = [Row(method, shots, seed, "1", 0.5 + seed / 10, 0, 0, 0, 0, 0)
            for method, seeds in [("calm", 2), ("sav", 4)] for shots in (1, 5) for seed in range(seeds)]  # fmt: skip
    report(rows, tmp_path)
    shown = capsys.readouterr().out
    assert shown.count("55.0 (of 2 draws)") == 2 and "the others are of 4 draws" in " ".join(shown.split())
    found = json.loads((tmp_path / "comparison.json").read_text())["accuracy"]
    assert {method: points["5"]["draws"] for method, points in found.items()} == {"calm": 2, "sav": 4}
    report([row for row in rows if row.seed < 2], tmp_path)
    assert "draws)" not in capsys.readouterr().out


def test_test_clips_without_a_label_are_left_out_and_counted(tones, tiny_lalm, tmp_path, capsys):
    clips = read_manifest(tones)
    bare = next(i for i, clip in enumerate(clips) if clip.split == "test")
    clips[bare] = replace(clips[bare], label=None)
    write_manifest(clips, tmp_path / "clips.jsonl")
    compare(
        "--data", "manifest", "--data.recipe.init_args.data_dir", tmp_path / "clips.jsonl", "--backbone", tiny_lalm,
        "--data.num_workers", 0, "--shots", 1, "--seeds", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: 1 clips without a label, such as {clips[bare].audio}" in said
