"""Labels that the backbone gives itself: votes and likelihoods, a kill in the middle, and learning from them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.sampling import sampled_votes
from calm_pl.clip import Clip
from calm_pl.data import ManifestError, read_manifest, write_manifest
from calm_pl.data.recipes import Folder
from calm_pl.data.splits import draw_support
from calm_pl.data.unlabelled import relabelled, unlabelled_clips
from calm_pl.training.pseudolabels import Asking, labelled, likelihood_shares, vote_shares
from tests.conftest import tone
from tests.test_run import calm, calm_process

CLASSES = ["dog", "rain", "siren"]
CLIPS = [Clip(f"/{n}.wav") for n in range(4)]


def test_the_majority_is_a_share_of_all_answers():
    votes_NV = torch.tensor([[3.0, 1.0, 0.0, 1.0], [0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 5.0, 0.0]])
    found = labelled(CLIPS, CLASSES, vote_shares(votes_NV), Asking(by="answers"))
    assert [(clip.audio, clip.label, clip.confidence) for clip in found] == [
        ("/0.wav", "dog", pytest.approx(0.6)), ("/3.wav", "siren", 1.0),
    ]  # fmt: skip
    # Answers that name nothing are no label, whatever the threshold.
    assert len(labelled(CLIPS, CLASSES, vote_shares(votes_NV), Asking(by="answers", threshold=0.0))) == 3


def test_balance_takes_out_how_common_a_name_is():
    common_NC = torch.tensor([[-1.0, -5.0, -6.0], [-1.0, -3.0, -6.0], [-1.0, -5.0, -4.0]])
    assert likelihood_shares(common_NC, balance=False).argmax(1).tolist() == [0, 0, 0]
    assert likelihood_shares(common_NC, balance=True).argmax(1).tolist() == [0, 1, 2]


@given(st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_only_the_surest_of_each_class_are_kept(keep, threshold, seed):
    confidences_NC = torch.rand(20, 3, generator=torch.Generator().manual_seed(seed)).softmax(1)
    clips = [Clip(f"/{n}.wav") for n in range(20)]
    found = labelled(clips, CLASSES, confidences_NC, Asking(keep=keep, threshold=threshold))
    assert all(count <= keep for count in Counter(clip.label for clip in found).values())
    assert [clip.audio for clip in found] == [clip.audio for clip in clips if clip.audio in {f.audio for f in found}]
    for clip in found:
        row_C = confidences_NC[int(clip.audio[1:-4])]
        rivals = confidences_NC[confidences_NC.argmax(1) == row_C.argmax()].amax(1)
        assert clip.label == CLASSES[row_C.argmax()] and clip.confidence >= threshold - 1e-6
        assert (rivals > row_C.max()).sum() < keep


@pytest.mark.parametrize(("options", "message"), [({"by": "ear"}, "choose likelihood"), ({"trials": 0}, "above 0")])
def test_ways_of_asking_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Asking(**options)


def test_the_same_seed_draws_the_same_answers(tones, tiny_lalm):
    lalm = FrozenLALM.from_pretrained(tiny_lalm)
    clips = read_manifest(tones)[:3]
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    letters = list("abcdefghijklmnopqrstuvwxyz")  # a random model says such things now and then
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(sampled_votes(lalm, inputs, letters, trials=40, max_new_tokens=8))
    assert drawn[0].shape == (3, 27) and drawn[0].sum(1).tolist() == [40.0] * 3
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# From the command line


def pseudolabel(tones: Path, tiny_lalm: str, *more: object) -> list[str]:
    return [
        "pseudolabel", "--data", "folder", "--data.recipe.init_args.data_dir", str(tones), "--backbone", tiny_lalm,
        "--data.num_workers", "0", "--accelerator", "cpu", *map(str, more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def by_likelihood(tones, tiny_lalm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pseudo") / "pseudo.jsonl"
    calm(*pseudolabel(tones, tiny_lalm, "--out", out))
    return out


def test_training_clips_alone_are_labelled(by_likelihood, tones):
    found = read_manifest(by_likelihood)
    assert {clip.audio for clip in found} == {str(file) for file in (tones / "train").rglob("*.wav")}
    assert all(clip.label in ("high", "low", "middle") and 0 < clip.confidence <= 1 for clip in found)


def test_a_folder_needs_class_names(tones, tiny_lalm, tmp_path, capsys):
    arguments = ["pseudolabel", "--clips", tones / "test", "--backbone", tiny_lalm, "--accelerator", "cpu"]
    with pytest.raises(SystemExit, match="name at least two classes"):
        calm(*arguments)
    with pytest.raises(SystemExit, match=r"end the name in \.jsonl"):
        calm(*arguments, "--classes", "hum, whistle", "--out", "labels.csv")
    out = tmp_path / "out.jsonl"
    calm(*arguments, "--classes", "hum, whistle", "--asking.keep", "2", "--data.num_workers", "0", "--out", out)
    assert {clip.label for clip in read_manifest(out)} <= {"hum", "whistle"}
    assert "of 9 clips got a label" in capsys.readouterr().out


def test_of_one_clip_no_average_is_taken(tones, tiny_lalm, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(tones / "test" / "low" / "0.wav", tmp_path / "one")
    arguments = ["pseudolabel", "--clips", tmp_path / "one", "--backbone", tiny_lalm, "--accelerator", "cpu"]
    shares = []
    for balance in ("true", "false"):
        out = tmp_path / f"{balance}.jsonl"
        told = pytest.warns(UserWarning, match="1 clips do not tell") if balance == "true" else contextlib.nullcontext()
        with told:
            calm(*arguments, "--classes", "hum, whistle, bang", "--asking.balance", balance, "--out", out)
        shares += [(clip.label, clip.confidence) for clip in read_manifest(out)]
    assert len(shares) == 2 and shares[0] == shares[1] and shares[0][1] > 0.334


def test_a_name_that_no_manifest_could_hold_is_told_at_once(tones, tmp_path):
    shutil.copy(tones / "test" / "low" / "0.wav", os.fsencode(tmp_path) + b"/na\xefve.wav")
    with pytest.raises(ManifestError, match="not UTF-8"):
        unlabelled_clips(tmp_path)


def test_clips_are_known_again_by_another_way_to_their_folder(by_likelihood, tones):
    (tones.parent / "elsewhere").mkdir(exist_ok=True)
    pool = Folder(str(tones.parent / "elsewhere" / ".." / tones.name)).clips()
    assert len(relabelled(pool, by_likelihood)) == 12


def test_a_killed_run_goes_on_and_ends_with_the_same_labels(tiny_lalm, tmp_path):
    folder = tmp_path / "sounds"
    for n in range(24):
        tone(folder / f"{n}.wav", 200 + 100 * n, 0.4, n)
    words = ",".join("abcdefghijklmnopqrstuvwxyz")
    answers = ["--asking.by", "answers", "--asking.trials", 20, "--asking.threshold", 0, "--data.batch_size", 1]
    arguments = [
        *pseudolabel(folder, tiny_lalm)[:1], "--clips", str(folder), "--classes", words,
        *pseudolabel(folder, tiny_lalm, *answers)[5:],
    ]  # fmt: skip
    store = tmp_path / "killed"
    environment = {**os.environ, "CALM_STORE": str(store), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "calm_pl", *arguments, "--out", str(tmp_path / "killed.jsonl")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(store.glob("*/*.safetensors"))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.jsonl").exists()

    resumed = calm_process(*arguments, "--out", tmp_path / "killed.jsonl", CALM_STORE=str(store))
    assert resumed.returncode == 0, resumed.stderr
    asked_again = int(re.findall(r"sampling answers: (\d+) clips, ", resumed.stderr)[-1])
    assert 0 < asked_again <= 20
    whole = calm_process(*arguments, "--out", tmp_path / "whole.jsonl", CALM_STORE=str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


# Learning from them


@pytest.fixture(scope="module")
def one_wrong(tones, tmp_path_factory) -> Path:
    """Pseudo-labels of all training clips but one, one of them wrong."""
    clips = [clip for clip in read_manifest(tones) if clip.split == "train"]
    given = [Clip(clip.audio, clip.label, "train", confidence=0.9) for clip in clips[1:]]
    given[0] = Clip(given[0].audio, "low", "train", confidence=0.5)  # in truth high
    out = tmp_path_factory.mktemp("labels") / "pseudo.jsonl"
    write_manifest(given, out)
    return out


def test_true_and_pseudo_labels_stand_in_one_table(tones, tiny_lalm, one_wrong, tmp_path):
    fit = [
        "fit", "--data", "folder", "--data.recipe.init_args.data_dir", tones, "--backbone", tiny_lalm,
        "--data.shots", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--model", "formula",
    ]  # fmt: skip
    calm(*fit, "--run_dir", tmp_path / "true")
    calm(*fit, "--run_dir", tmp_path / "pseudo", "--data.pseudo_labels", one_wrong, "--data.by_confidence", "true")
    results = json.loads((tmp_path / "pseudo" / "results.json").read_text())
    assert results["pseudo_labels"]["of"] == 6 and results["pseudo_labels"]["right"] in (5, 6)
    assert results["splits"]["test"] == 9
    calm("report", tmp_path / "true", tmp_path / "pseudo", "--out", tmp_path / "both")
    rows = list(csv.DictReader((tmp_path / "both" / "comparison.csv").open()))
    assert {row["method"] for row in rows} == {"calm_whitened", "calm_whitened, pseudo-labels, by confidence"}
    assert len({(row["dataset"], row["protocol"], row["settings"]) for row in rows}) == 1


def test_a_manifest_with_confidence_is_read(one_wrong, tones):
    pool = [clip for clip in read_manifest(tones) if clip.split == "train"]
    found = relabelled(pool, one_wrong)
    assert len(found) == len(pool) - 1 and found[0].label == "low" and found[0].confidence == 0.5
    with pytest.raises(ValueError, match="knows none of the 1 training clips"):
        relabelled([Clip("/elsewhere.wav", "low", "train")], one_wrong)


def test_a_confidence_is_a_share(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "label": "dog", "confidence": 7}\n')
    with pytest.raises(ManifestError, match="confidence must be a number from 0 to 1, found 7"):
        read_manifest(tmp_path / "m.jsonl")


def test_sure_clips_are_drawn_more_often():
    pool = [Clip(f"/{n}.wav", "dog", "train", confidence=0.9 if n == 0 else 0.1) for n in range(10)]
    drawn = Counter(draw_support(pool, 1, seed, by_confidence=True)[0] for seed in range(300))
    assert 0.4 < drawn[0] / 300 < 0.6  # 0.9 of 0.9 + 9 x 0.1
    uniform = Counter(draw_support(pool, 1, seed)[0] for seed in range(300))
    assert uniform[0] / 300 < 0.2
    assert set(draw_support(pool, 2, 5, by_confidence=True)) < set(draw_support(pool, 4, 5, by_confidence=True))


def test_unlabelled_clips_are_all_sounds_of_a_folder(tones, tmp_path):
    assert len(unlabelled_clips(tones)) == 21 and not any(clip.labels for clip in unlabelled_clips(tones))
    with pytest.raises(ValueError, match="no audio files in it"):
        unlabelled_clips(tmp_path)
