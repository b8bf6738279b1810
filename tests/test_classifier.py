"""CalmClassifier: fit on files, predict, save, load, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calm_pl import CalmClassifier
from calm_pl.audio import AudioError
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.cli import main
from calm_pl.clip import Clip
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import Whitened
from tests.conftest import tone
from tests.test_wrong_weights import lora


def test_probabilities_are_probabilities(classifier, labelled):
    probabilities_NC = classifier.predict_proba(labelled[0])
    assert classifier.classes == ["high", "low", "middle"]
    assert probabilities_NC.shape == (12, 3) and probabilities_NC.dtype == torch.float32
    assert (probabilities_NC >= 0).all()
    torch.testing.assert_close(probabilities_NC.sum(1), torch.ones(12))
    assert classifier.predict(labelled[0]) == [classifier.classes[i] for i in probabilities_NC.argmax(1)]


def test_what_is_saved_predicts_the_same(classifier, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    classifier.save_pretrained("~/saved")
    tmp_path = tmp_path / "saved"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["classifier.json", "classifier.safetensors"]
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # whoever may read one may read both
    loaded = CalmClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.predict_proba(labelled[0]), classifier.predict_proba(labelled[0]))
    assert loaded.method.choices() == classifier.method.choices()


@pytest.mark.parametrize(
    "as_given", [list, np.array, torch.tensor, lambda labels: (np.int32(label) for label in labels)]
)
def test_whole_numbers_are_class_names_too(as_given, labelled, tiny_lalm, tmp_path):
    numbers = [10 if name == "low" else 9 for name in labelled[1]]
    fitted = CalmClassifier(SAV(num_heads=5)).fit(iter(labelled[0]), as_given(numbers), backbone=tiny_lalm)
    fitted.save_pretrained(tmp_path)
    for used in (fitted, CalmClassifier.from_pretrained(tmp_path)):
        assert used.classes == [9, 10] and [type(name) for name in used.classes] == [int, int]
        assert set(used.predict(iter(labelled[0]))) <= {9, 10}


def test_names_in_an_array_are_text(labelled, tiny_lalm, tmp_path):
    fitted = CalmClassifier(SAV(num_heads=5)).fit(labelled[0], np.array(labelled[1]), backbone=tiny_lalm)
    assert [type(name) for name in fitted.classes] == [str, str, str]


def test_a_save_or_a_fit_that_fails_leaves_the_older_classifier(labelled, tiny_lalm, tmp_path, monkeypatch):
    classifier = CalmClassifier().fit(*labelled, backbone=tiny_lalm)
    classifier.save_pretrained(tmp_path)
    older = {file: file.read_bytes() for file in tmp_path.iterdir()}
    predicted = classifier.predict(labelled[0][:3])
    with pytest.raises(AudioError, match="missing"):
        classifier.fit([*labelled[0], "missing.wav"], [*labelled[1], "a new one"], dtype="bfloat16", backbone=tiny_lalm)
    assert classifier.predict(labelled[0][:3]) == predicted and len(classifier.classes) == 3
    assert classifier.dtype == "float32"
    for broken in ("choices", "state_dict"):
        with monkeypatch.context() as patched:
            patched.setattr(classifier.method, broken, lambda: {"cannot be saved": object()})
            with pytest.raises((TypeError, AttributeError)):
                classifier.save_pretrained(tmp_path)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == older
    replace = Path.replace
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        # Killed right before the config, which is the last to come.
        patched.setattr(Path, "replace", lambda file, to: broken_off() if to.suffix == ".json" else replace(file, to))
        classifier.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no classifier"):
        CalmClassifier.from_pretrained(tmp_path)


def broken_off() -> None:
    raise KeyboardInterrupt


def test_a_shipped_backbone_is_saved_by_its_name(tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calm-tiny").mkdir()
    files = sorted((tones / "train").rglob("0.wav"))
    CalmClassifier(SAV(num_heads=5)).fit(files, [file.parent.name for file in files]).save_pretrained("saved")
    assert json.loads(Path("saved/classifier.json").read_text())["backbone"]["path"] == "calm-tiny"


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
    folders = [str(tmp_path / "run"), str(tmp_path / "other")]
    bases = [CalmClassifier(LearnedWeights(tau=tau)).fit(*labelled, backbone=tiny_lalm) for tau in (0.05, 0.3)]
    for folder, base in zip(folders, bases, strict=True):
        base.save_pretrained(Path(folder) / "classifier")
    one_shot = [labelled[0][i] for i in (0, 4, 8)], [labelled[1][i] for i in (0, 4, 8)]
    wanted_K = sum(base.method.weights().mean(1) for base in bases) / 2
    far = []
    for base_clips in (0.0, 1e6):
        method = LearnedWeights(base=folders, base_clips=base_clips, tau=0.15)
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


def test_a_clip_with_several_labels_is_an_example_of_each(several, labelled, tiny_lalm, tmp_path):
    assert several.classes == ["dull", "high", "low", "middle", "shrill"]
    rows = [0, *(n for n in range(1, 12) for _ in range(2))]
    names = ["high", *(name for pitch in labelled[1][1:] for name in (pitch, "shrill" if pitch == "high" else "dull"))]
    alone = CalmClassifier(SAV(num_heads=5)).fit([labelled[0][n] for n in rows], names, backbone=tiny_lalm)
    torch.testing.assert_close(several.predict_proba(labelled[0]), alone.predict_proba(labelled[0]))
    several.save_pretrained(tmp_path)
    assert CalmClassifier.from_pretrained(tmp_path).labels_per_clip == several.labels_per_clip == 23 / 12


def test_the_most_probable_classes_of_a_clip_come_first(several, classifier, labelled):
    files = labelled[0][:3]
    probabilities_NC = several.predict_proba(files)
    for n, count in ((None, 2), (1, 1), (5, 5)):  # 23 / 12, rounded
        found = several.predict_top(files, n)
        assert [len(classes) for classes in found] == [count] * 3
        assert [[sure for _, sure in classes] for classes in found] == probabilities_NC.topk(count).values.tolist()
        for probabilities_C, classes in zip(probabilities_NC, found, strict=True):
            assert all(probabilities_C[several.classes.index(name)] == sure for name, sure in classes)
    assert [[name for name, _ in classes] for classes in several.predict_top(files, 1)] == [
        [name] for name in several.predict(files)
    ]
    assert [len(classes) for classes in classifier.predict_top(files)] == [1, 1, 1]
    for n in (0, 6):
        with pytest.raises(ValueError, match=f"top {n}: of each clip, 1 to 5 classes can be told"):
            several.predict_top(files, n)


def test_a_coverage_has_a_confidence_below_which_a_clip_is_unknown(classifier, labelled, tmp_path, capsys):
    assert classifier.threshold(0.5) >= classifier.threshold(0.9) >= classifier.threshold(1.0)
    with pytest.raises(ValueError, match=r"coverage=0\.42.*0\.95"):
        classifier.threshold(0.42)
    classifier.save_pretrained(tmp_path)
    between = [str(tone(tmp_path / f"{pitch}.wav", pitch)) for pitch in (350, 550, 800, 1200, 2500)]
    files = [*map(str, labelled[0]), *between]
    assert main(["classify", str(tmp_path), "--coverage", "0.5", *files]) == 0
    said = [line.rsplit(",", 2)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    confidence_N, prediction_N = classifier.predict_proba(files).max(1)
    expected = [
        classifier.classes[prediction] if confidence >= classifier.threshold(0.5) else "unknown"
        for confidence, prediction in zip(confidence_N.tolist(), prediction_N.tolist(), strict=True)
    ]
    assert said == expected and "unknown" in said and len(set(said)) > 1


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
    [
        (["a.wav"], ["x", "y"], "1 files and 2 labels"),
        (["a.wav", "b.wav"], ["x", "x"], "at least two are needed"),
        (["a.wav", "b.wav"], [1, 1], "at least two are needed"),
        ("ab", ["x", "y"], "files is one clip"),
        (["a.wav", "b.wav"], "xy", "labels is one text"),
        (["a.wav", "b.wav"], ["x", None], r"labels\[1\] is None"),
        (["a.wav", "b.wav"], ["x", ""], r"labels\[1\] is ''"),
        (["a.wav", "b.wav"], ["x", 1], r"labels\[1\] is 1"),
        (["a.wav", "b.wav"], [1, float("nan")], r"labels\[1\] is nan"),
        (["a.wav", "b.wav"], np.array([[0, 1], [1, 0]]), r"labels\[0\] is \[0, 1\]"),
        (["a.wav", "b.wav"], [["x", "y"], []], r"labels\[1\] is \[\]"),
        (["a.wav", "b.wav"], [["x", "y"], ["x", ""]], r"labels\[1\] is \['x', ''\]"),
        (["a.wav", "b.wav"], [["x", ["y"]], ["x"]], r"labels\[0\] is \['x', \['y'\]\]"),
        (["a.wav", "b.wav"], [1, ["x"]], r"labels\[0\] is 1"),
    ],
)
def test_fit_refuses_what_makes_no_sense(files, labels, message):
    with pytest.raises(ValueError, match=message):
        CalmClassifier().fit(files, labels)


@pytest.mark.parametrize("one", [str, Path, lambda file: Clip(audio=str(file))])
def test_one_path_is_no_list_of_files(classifier, labelled, one):
    for use in (classifier.predict, classifier.predict_proba):
        with pytest.raises(ValueError, match="files is one clip"):
            use(one(labelled[0][0]))


def test_a_device_that_is_not_there_is_told(capsys, classifier, labelled, tmp_path):
    with pytest.raises(ValueError, match="device='gpu' cannot be used here.* give cpu"):
        CalmClassifier(device="gpu")
    classifier.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="calm: error: device='gpu'"):
        main(["classify", str(tmp_path), "--device", "gpu", str(labelled[0][0])])


def test_unfitted_says_what_to_do():
    with pytest.raises(RuntimeError, match="not fitted yet: call fit"):
        CalmClassifier().predict(["a.wav"])


def test_a_folder_without_classifier_says_what_to_give(tmp_path):
    for nothing, message in ((tmp_path, "holds no"), ("no-folder", "holds no"), ("a/b", "a/b is no folder here, and")):
        with pytest.raises(FileNotFoundError, match=message):
            CalmClassifier.from_pretrained(nothing)


def edited(change):
    def edit(folder):
        config = json.loads((folder / "classifier.json").read_text())
        change(config)
        (folder / "classifier.json").write_text(json.dumps(config))

    return edit


def truncated(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def with_other_weights(folder):
    weights = load_file(folder / "classifier.safetensors")
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "classifier.safetensors", {"x": "y"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated("classifier.safetensors", 0), r"classifier\.safetensors: damaged"),
        (truncated("classifier.safetensors", 3000), r"classifier\.safetensors: damaged"),
        (with_other_weights, r"classifier\.safetensors: damaged.*other weights than classifier\.json"),
        (truncated("classifier.json", 100), r"classifier\.json: damaged"),
        (truncated("classifier.json", 0), r"classifier\.json: damaged"),
        (lambda folder: (folder / "classifier.json").write_text("[1]"), r"classifier\.json: damaged"),
        (edited(lambda config: config.pop("dtype")), r"classifier\.json: damaged.*'dtype' is missing"),
        (edited(lambda config: config["backbone"].update(x=1)), r"classifier\.json: damaged.*'x'"),
        (edited(lambda config: config["backbone"].update(pooling="x")), r"classifier\.json: damaged"),
        (edited(lambda config: config.update(format=7)), r"classifier\.json: .*format 7; this version reads 1"),
        (edited(lambda config: config.update(method="calm_pl.audio")), r"classifier\.json: damaged"),
        (edited(lambda config: config.update(method="calm_pl.audio.load_audio")), r"classifier\.json: .*no method"),
        (edited(lambda config: config.update(method="calm_pl.nothing.Here")), r"classifier\.json: damaged"),
        (edited(lambda config: config.update(method=3)), r"classifier\.json: damaged"),
        (edited(lambda config: config.update(method="os.path.join")), r"classifier\.json: .*no method of calm_pl"),
        (edited(lambda config: config.update(labels_per_clip=4)), r"classifier\.json: .*labels_per_clip is 4\.0, of 3"),
        (edited(lambda config: config["classes"].pop()), "is for 3 classes, classifier.json names 2"),
    ],
)
def test_a_damaged_folder_is_told_by_the_name_of_the_file(damage, message, classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        CalmClassifier.from_pretrained(tmp_path)


def test_a_classifier_saved_without_a_digest_is_read(classifier, labelled, tmp_path):
    classifier.save_pretrained(tmp_path)
    edited(lambda config: config.pop("weights_sha256"))(tmp_path)
    assert CalmClassifier.from_pretrained(tmp_path).predict(labelled[0]) == classifier.predict(labelled[0])


def test_a_bad_clip_is_named(classifier, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="empty.wav"):
        classifier.predict([tmp_path / "empty.wav"])


def test_the_question_of_the_support_set_is_asked_in_use(labelled, tiny_lalm, tmp_path):
    clips = [Clip(str(file), question="How high is it?") for file in labelled[0]]
    fitted = CalmClassifier().fit(clips, labelled[1], backbone=tiny_lalm)
    fitted.save_pretrained(tmp_path)
    for used in (fitted, CalmClassifier.from_pretrained(tmp_path)):
        assert torch.equal(used.predict_proba(labelled[0]), used.predict_proba(clips))
        others = [Clip(clip.audio, question="Why?") for clip in clips]
        assert not torch.equal(used.predict_proba(others), used.predict_proba(clips))
    clips[0] = Clip(clips[0].audio, question="Why?")
    with pytest.warns(UserWarning, match="2 different questions; in use, a clip that brings none is asked 'What sound"):
        assert CalmClassifier().fit(clips, labelled[1], backbone=tiny_lalm).question is None


def test_an_adapter_belongs_to_the_classifier(labelled, tiny_lalm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora(tiny_lalm, tmp_path / "lora")
    fitted = CalmClassifier().fit(*labelled, backbone=Backbone(tiny_lalm, adapter="lora"))
    fitted.save_pretrained("saved")
    predicted = fitted.predict_proba(labelled[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(CalmClassifier.from_pretrained(tmp_path / "saved").predict_proba(labelled[0]), predicted)
    (tmp_path / "lora").rename(tmp_path / "moved")
    moved = CalmClassifier.from_pretrained(tmp_path / "saved", adapter=str(tmp_path / "moved"))
    assert torch.equal(moved.predict_proba(labelled[0]), predicted)
    file = str(labelled[0][0])
    assert main(["classify", str(tmp_path / "saved"), file, "--adapter", str(tmp_path / "moved")]) == 0
    lora(tiny_lalm, tmp_path / "lora")  # of other weights
    with pytest.raises(BackboneError, match=r"adapter/adapter_model\.safetensors differ"):
        CalmClassifier.from_pretrained(tmp_path / "saved").predict(labelled[0])
