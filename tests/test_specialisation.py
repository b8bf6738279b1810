"""Whether classes rely on different heads: overlap against chance, ablation, and the command."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl import cli
from calm_pl.report.specialisation import chance_overlap, mean_overlap
from tests.test_run import calm, options


@given(st.integers(1, 7).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))))
def test_chance_overlap_is_the_mean_over_all_pairs_of_sets(total_and_size):
    total, size = total_and_size
    sets = [set(chosen) for chosen in itertools.combinations(range(total), size)]
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.product(sets, sets)]
    assert chance_overlap(total, size) == pytest.approx(sum(overlaps) / len(overlaps))


def test_mean_overlap_of_equal_and_of_disjoint_sets():
    assert mean_overlap(torch.tensor([[1, 2], [2, 1], [1, 2]])) == 1
    assert mean_overlap(torch.tensor([[1, 2], [3, 4]])) == 0
    assert mean_overlap(torch.tensor([[1, 2], [2, 3]])) == pytest.approx(1 / 3)


def test_heads_of_a_run(tones, tiny_lalm, tmp_path, capsys):
    fast = ["--model.methods.calm_learned.init_args.steps", "2"]
    calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, *fast))
    first = json.loads((tmp_path / "heads.json").read_text())
    assert "most trusted of all alone" in (tmp_path / "report.html").read_text()  # every run tells how few are enough
    assert cli.main(["heads", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "heads.json").read_text())
    assert first == {name: found[name] for name in ("accuracy_with_heads_kept", "clips")}  # all clips fit into 256
    results = json.loads((tmp_path / "results.json").read_text())
    kept = results["methods"]["calm_learned"]["accuracy"]
    assert sum(found["accuracy"].values()) / 3 == pytest.approx(kept)  # classes of equal size
    assert found["accuracy_with_heads_kept"]["16"] == pytest.approx(kept)
    assert sum(found["site_share"].values()) == pytest.approx(1)
    assert found["ablation"].keys() == found["accuracy"].keys() == {"low", "middle", "high"}
    assert (tmp_path / "plots" / "ablation.svg").is_file() and (tmp_path / "plots" / "heads-kept.png").is_file()
    page = (tmp_path / "report.html").read_text()
    assert "Do classes rely on different heads?" in page and "<figcaption>Change in points" in page
    assert "random heads" in capsys.readouterr().out


def test_weights_that_all_classes_share_are_told(tones, tiny_lalm, tmp_path, capsys):
    start = ["--model.methods.calm_learned.init_args.steps", "0"]
    calm("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, "--model.zero_shot", "false", *start))
    assert cli.main(["heads", str(tmp_path)]) == 0
    assert "All classes weigh the heads alike" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "All classes weigh the 16 attention heads alike" in page and "The same map for each class" not in page
    assert not (tmp_path / "plots" / "heads-by-class.svg").exists()


def test_a_class_without_test_clips_has_no_accuracy(tones, tiny_lalm, tmp_path, capsys):
    """Only its support clips are left; 0 would be a figure that nobody measured."""
    shutil.copytree(tones, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "test" / "low")
    apart = ["--model.methods.calm_learned.init_args.steps", "2"]  # weights that differ between classes, whatever helps
    calm("fit", *options(tmp_path / "some", tiny_lalm, "--run_dir", tmp_path / "run", *apart))
    assert cli.main(["heads", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "heads.json").read_text())
    assert found["accuracy"]["low"] is None and found["ablation"]["high"]["low"] is None
    assert found["accuracy"]["high"] is not None
    assert "nan" not in capsys.readouterr().out and (tmp_path / "run" / "plots" / "ablation.png").is_file()


def test_no_run_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no finished run"):
        cli.main(["heads", str(tmp_path)])


def test_the_folder_of_all_folds_points_to_one_of_them(tmp_path):
    (tmp_path / "results.json").write_text('{"methods": {}, "folds": {"fold1": {}, "fold2": {}}}')
    with pytest.raises(SystemExit, match=rf"averages of 2 folds.*such as {tmp_path / 'fold1'}\.$"):
        cli.main(["heads", str(tmp_path)])
