"""CalmClassifier: fit on files, predict, save, load, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from calm_pl import CalmClassifier
from calm_pl.audio import AudioError
from calm_pl.backbone.errors import BackboneError
from calm_pl.baselines import SAV
from calm_pl.cli import main
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import Whitened
from tests.conftest import damaged, tone


@pytest.fixture(scope="module")
def labelled(tones: Path) -> tuple[list[Path], list[str]]:
    files = sorted((tones / "train").rglob("*.wav"))
    return files, [file.parent.name for file in files]


@pytest.fixture(scope="module")
def classifier(labelled, tiny_lalm) -> CalmClassifier:
    return CalmClassifier().fit(*labelled, backbone=tiny_lalm)


def test_probabilities_are_probabilities(classifier, labelled):
    probabilities_NC = classifier.predict_proba(labelled[0])
    assert classifier.classes == ["high", "low", "middle"]
    assert probabilities_NC.shape == (12, 3) and probabilities_NC.dtype == torch.float32
    assert (probabilities_NC >= 0).all()
    torch.testing.assert_close(probabilities_NC.sum(1), torch.ones(12))
    assert classifier.predict(labelled[0]) == [classifier.classes[i] for i in probabilities_NC.argmax(1)]


def test_what_is_saved_predicts_the_same(classifier, labelled, tmp_path):
    classifier.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classifier.json", "classifier.safetensors"]
    loaded = CalmClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(labelled[0]), classifier.predict_proba(labelled[0]))
    assert loaded.method.choices() == classifier.method.choices()


def test_any_method_can_be_the_classifier(labelled, tiny_lalm, tmp_path):
    voting = CalmClassifier(SAV(num_heads=5)).fit(*labelled, backbone=tiny_lalm)
    voting.save_pretrained(tmp_path)
    assert CalmClassifier.from_pretrained(tmp_path).predict(labelled[0]) == voting.predict(labelled[0])


def test_a_baseline_in_the_metric_can_be_the_classifier(labelled, tiny_lalm, tmp_path):
    voting = CalmClassifier(Whitened(SAV(num_heads=5))).fit(*labelled, backbone=tiny_lalm)
    voting.save_pretrained(tmp_path)
    loaded = CalmClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(labelled[0]), voting.predict_proba(labelled[0]))


def test_heads_trusted_on_another_set_are_trusted_from_the_start(labelled, tiny_lalm, tmp_path):
    base = CalmClassifier(LearnedWeights(tau=0.05)).fit(*labelled, backbone=tiny_lalm)
    base.save_pretrained(tmp_path / "run" / "classifier")
    one_shot = [labelled[0][i] for i in (0, 4, 8)], [labelled[1][i] for i in (0, 4, 8)]
    wanted_K = base.method.weights().mean(1)
    far = []
    for base_clips in (0.0, 1e6):
        method = LearnedWeights(base=[str(tmp_path / "run")], base_clips=base_clips, tau=0.15)
        fitted = CalmClassifier(method).fit(*one_shot, backbone=tiny_lalm)
        far.append((fitted.method.weights().mean(1) - wanted_K).abs().max())
    assert far[1] < 1e-3 < far[0]


def test_a_base_that_cannot_be_one_is_refused(classifier, tmp_path):
    heads_NKD, labels_N = torch.randn(4, 3, 5), torch.tensor([0, 1, 0, 1])
    with pytest.raises(FileNotFoundError, match="holds no classifier"):
        LearnedWeights(base=[str(tmp_path)]).fit(heads_NKD, labels_N, 2)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only calm_learned"):
        LearnedWeights(base=[str(tmp_path)]).fit(heads_NKD, labels_N, 2)


def test_a_coverage_has_a_confidence_below_which_a_clip_is_unknown(classifier, labelled, tmp_path, capsys):
    assert classifier.threshold(0.5) >= classifier.threshold(0.9) >= classifier.threshold(1.0)
    with pytest.raises(ValueError, match=r"coverage=0\.42.*0\.95"):
        classifier.threshold(0.42)
    classifier.save_pretrained(tmp_path)
    files = [str(file) for file in labelled[0]]
    assert main(["classify", str(tmp_path), "--coverage", "0.5", *files]) == 0
    rows = [line.rsplit(",", 2) for line in capsys.readouterr().out.splitlines()[1:]]
    unknown = [float(confidence) for _, name, confidence in rows if name == "unknown"]
    known = [float(confidence) for _, name, confidence in rows if name != "unknown"]
    assert not unknown or max(unknown) <= classifier.threshold(0.5) + 1e-4
    assert min(known) >= classifier.threshold(0.5) - 1e-4


def test_another_backbone_is_refused(classifier, labelled, tiny_lalm, tmp_path):
    other = shutil.copytree(tiny_lalm, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-4
    (other / "config.json").write_text(json.dumps(config))
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(BackboneError, match=r"not the one this classifier was fitted on: config\.json"):
        CalmClassifier.from_pretrained(tmp_path / "classifier", backbone=str(other))
    moved = shutil.copytree(tiny_lalm, tmp_path / "moved")  # the same model in another place is the same model
    loaded = CalmClassifier.from_pretrained(tmp_path / "classifier", backbone=str(moved))
    assert loaded.predict(labelled[0][:2]) == classifier.predict(labelled[0][:2])


def test_a_backbone_changed_since_fitting_is_noticed(labelled, tiny_lalm, tmp_path):
    model = shutil.copytree(tiny_lalm, tmp_path / "model")
    CalmClassifier().fit(*labelled, backbone=str(model)).save_pretrained(tmp_path / "classifier")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "unhelpful"))
    with pytest.raises(BackboneError, match="chat_template.jinja"):
        CalmClassifier.from_pretrained(tmp_path / "classifier").predict(labelled[0][:1])


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [(["a.wav"], ["x", "y"], "1 files and 2 labels"), (["a.wav", "b.wav"], ["x", "x"], "at least two are needed")],
)
def test_fit_refuses_what_makes_no_sense(files, labels, message):
    with pytest.raises(ValueError, match=message):
        CalmClassifier().fit(files, labels)


def test_unfitted_says_what_to_do():
    with pytest.raises(RuntimeError, match="not fitted yet: call fit"):
        CalmClassifier().predict(["a.wav"])


def test_a_folder_without_classifier_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no classifier"):
        CalmClassifier.from_pretrained(tmp_path)


def test_code_from_outside_is_never_imported(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "classifier.json").read_text())
    config["method"] = "os.path.join"
    (tmp_path / "classifier.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no method of calm_pl"):
        CalmClassifier.from_pretrained(tmp_path)


def test_a_bad_clip_is_named(classifier, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="empty.wav"):
        classifier.predict([tmp_path / "empty.wav"])


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
