"""`calm classify`: a saved classifier on audio files, at the command line."""

from __future__ import annotations

import csv
import os
import shutil

import pytest
import torch

from calm_pl import CalmClassifier
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.cli import main
from tests.conftest import damaged, tone
from tests.test_classifier import edited


def test_classify_prints_a_line_for_each_class_of_a_clip(several, labelled, tmp_path, capsys, monkeypatch):
    several.save_pretrained(tmp_path)
    files = [str(file) for file in labelled[0][:2]]
    for arguments, count in (((), 2), (("--top", "3"), 3)):
        assert main(["classify", str(tmp_path), *arguments, *files]) == 0
        told = zip(files, several.predict_top(files, count), strict=True)
        lines = [f"{file},{name},{sure:.4f}" for file, classes in told for name, sure in classes]
        assert capsys.readouterr().out.splitlines() == ["path,prediction,confidence", *lines]
    for n in ("0", "6"):
        with pytest.raises(SystemExit, match=f"calm: error: top {n}: of each clip, 1 to 5 classes"):
            main(["classify", str(tmp_path), "--top", n, *files])
    monkeypatch.setattr(CalmClassifier, "threshold", lambda self, coverage: 2.0)
    assert main(["classify", str(tmp_path), "--coverage", "0.9", *files]) == 0
    unknown = [
        f"{file},unknown,{sure:.4f}" for file, ((_, sure),) in zip(files, several.predict_top(files, 1), strict=True)
    ]
    assert capsys.readouterr().out.splitlines()[1:] == unknown


def test_classify_of_one_label_a_clip_prints_a_line_a_clip(classifier, labelled, tmp_path, capsysbinary):
    classifier.save_pretrained(tmp_path)
    edited(lambda config: config.pop("labels_per_clip"))(tmp_path)  # as older ones were saved
    files = [str(file) for file in labelled[0]]
    assert main(["classify", str(tmp_path), *files]) == 0
    best = classifier.predict_proba(files).max(1)
    lines = [
        f"{file},{classifier.classes[c]},{confidence:.4f}"
        for file, c, confidence in zip(files, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    assert capsysbinary.readouterr().out.decode() == "".join(
        f"{line}\r\n" for line in ("path,prediction,confidence", *lines)
    )


def test_classify_passes_over_what_it_cannot_name_and_what_is_hidden(classifier, tmp_path, capsys):
    classifier.save_pretrained(tmp_path / "classifier")
    good = tone(tmp_path / "sounds" / "good.wav", 200)
    for name in (b"na\xefve.wav", b"._good.wav"):
        shutil.copy(good, os.fsencode(tmp_path / "sounds") + b"/" + name)
    assert main(["classify", str(tmp_path / "classifier"), str(tmp_path / "sounds")]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 and str(good) in shown.out
    assert shown.err.count(r"na\xefve.wav: its name is not UTF-8") == 1 and "._good" not in shown.err


def test_classify_prints_a_line_a_file_and_names_the_bad_ones(classifier, tmp_path, capsys):
    classifier.save_pretrained(tmp_path / "classifier")
    good = tone(tmp_path / "sounds" / "deep" / "good.wav", 200)
    (tmp_path / "sounds" / "bad.wav").write_bytes(b"")
    damaged(tmp_path / "sounds" / "loud.wav")
    assert main(["classify", str(tmp_path / "classifier"), str(tmp_path / "sounds")]) == 1
    shown = capsys.readouterr()
    header, line = shown.out.strip().splitlines()
    assert header == "path,prediction,confidence"
    assert line.split(",")[:2] == [str(good), classifier.predict([good])[0]]
    assert "bad.wav" in shown.err and "loud.wav: holds a sample of 3e+38" in shown.err
    assert "classifying" not in shown.err  # one pass
    assert main(["classify", str(tmp_path / "classifier"), str(tmp_path / "sounds"), "--batch-size", "2"]) == 1
    assert capsys.readouterr().err.startswith("classifying: 3 files\n")


def read_table(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))[1:]


def test_classify_says_the_same_with_and_without_workers(classifier, tmp_path, capfd):
    classifier.save_pretrained(tmp_path / "classifier")
    for number in range(5):
        tone(tmp_path / "sounds" / f"{number}.wav", 200 + 300 * number, seconds=0.4 + 0.1 * number)
    (tmp_path / "sounds" / "2-bad.wav").write_bytes(b"")
    told = {}
    for workers in "02":
        arguments = [str(tmp_path / "classifier"), str(tmp_path / "sounds"), "--batch-size", "2", "--workers", workers]
        assert main(["classify", *arguments]) == 1
        told[workers] = capfd.readouterr()
    assert told["0"].out == told["2"].out and told["2"].out.count("\n") == 6
    assert "2-bad.wav" in told["2"].err and "2-bad.wav" not in told["2"].out
    with pytest.raises(SystemExit, match="--workers -1: 0, or more"):
        main(["classify", str(tmp_path / "classifier"), str(tmp_path / "sounds"), "--workers", "-1"])


def test_classify_runs_in_halves_what_memory_does_not_hold(classifier, tmp_path, capsys, monkeypatch):
    classifier.save_pretrained(tmp_path / "classifier")
    files = [str(tone(tmp_path / f"{number}.wav", 300 * (number + 1))) for number in range(4)]
    arguments = ["classify", str(tmp_path / "classifier"), *files]
    assert main(arguments) == 0
    ample, forward = read_table(capsys.readouterr().out), FrozenLALM.forward

    def of_two_at_most(lalm, inputs):
        if len(inputs.last_token_B) > 2:
            raise torch.cuda.OutOfMemoryError
        return forward(lalm, inputs)

    monkeypatch.setattr(FrozenLALM, "forward", of_two_at_most)
    with pytest.warns(UserWarning, match="out of memory with a batch of 4 clips"):
        assert main(arguments) == 0
    told = read_table(capsys.readouterr().out)
    assert [row[:2] for row in told] == [row[:2] for row in ample] and len(told) == 4
    for row, before in zip(told, ample, strict=True):
        assert float(row[2]) == pytest.approx(float(before[2]), abs=2e-4)  # printed to four places


def test_classify_tells_once_of_files_that_are_cut(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "classifier")
    files = [str(tone(tmp_path / f"{seconds}.wav", 200, seconds=seconds)) for seconds in (1, 6, 7)]
    with pytest.warns(UserWarning) as told:
        assert main(["classify", str(tmp_path / "classifier"), *files, "--batch-size", "1"]) == 0
    assert [str(w.message)[:34] for w in told if "window" in str(w.message)] == ["2 of 3 clips are longer than the m"]


def test_classify_tells_what_it_cannot_begin_with(classifier, labelled, tmp_path, capsys):
    saved, empty, good = str(tmp_path / "classifier"), tmp_path / "empty", str(labelled[0][0])
    classifier.save_pretrained(saved)
    empty.mkdir()
    assert main(["classify", saved, str(empty)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and f"{empty}: no audio file" in shown.err
    assert main(["classify", saved, str(empty), "/dev/null", good]) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 and f"{empty}: no audio file" in shown.err
    assert "/dev/null: is no ordinary file" in shown.err
    with pytest.raises(SystemExit, match="--batch-size 0: at least 1"):
        main(["classify", saved, good, "--batch-size", "0"])
