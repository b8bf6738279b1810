"""The backbone asked in words: what is kept of its answers, and which class they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from calm_pl import cli
from calm_pl.backbone.answers import generate_answers, label_log_likelihoods, letter_log_likelihoods
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest, write_manifest
from calm_pl.data.options import mcq
from calm_pl.data.shard_writer import write_shards
from calm_pl.training.metrics import figures
from calm_pl.training.zero_shot import ZeroShot
from tests.conftest import tone
from tests.test_run import calm

CLASSES = ["dog", "rain", "sea", "wind"]


def clip(*options: str) -> Clip:
    return Clip("a.wav", "rain", options=options or None)


def asked(answers: str, clips: list[Clip]) -> ZeroShot:
    return ZeroShot(Backbone("random-qwen2-audio"), clips, CLASSES, answers)


def test_likelihoods_are_shared_among_the_listed_options():
    clips = [clip(), clip("wind", "dog"), clip("wind", "cow")]
    kept_NV = torch.tensor([[1.0, 2.0, 0.0, -1.0]]).expand(3, -1)
    probabilities_NC = asked("likelihood", clips).probabilities(kept_NV, clips)
    torch.testing.assert_close(probabilities_NC[0], kept_NV[0].softmax(0))
    torch.testing.assert_close(probabilities_NC[1], torch.tensor([torch.e**2, 0, 0, 1]) / (torch.e**2 + 1))
    torch.testing.assert_close(probabilities_NC[2], torch.tensor([0.0, 0, 0, 1]))  # no class is called cow


def test_letters_stand_for_the_options_in_their_order():
    clips = [clip("wind", "dog", "rain"), clip("sea", "wind")]
    kept_NV = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 9.0]])
    extraction = asked("letters", clips)
    assert extraction.num_letters == 3
    assert extraction.probabilities(kept_NV, clips).argmax(1).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("answer", "options", "named"),
    [
        ("It is rain.", (), 1),
        ("wind, then rain", (), 3),
        ("wind, then rain", ("rain", "sea"), 1),  # wind was not to choose from
        ("B", ("sea", "rain"), 1),
        ("B. wind", ("rain", "wind"), 3),
        ("A cow", ("rain", "wind"), None),
        ("no idea", (), None),
    ],
)
def test_generated_answers_name_a_class_or_none(answer, options, named):
    clips = [clip(*options)]
    extraction = asked("generation", clips)
    (row_C,) = extraction.probabilities(extraction._mentions(answer)[None], clips)
    assert row_C.tolist() == [float(index == named) for index in range(4)]


def test_no_answer_is_a_wrong_answer_of_no_class():
    answered = torch.eye(3)
    found = figures(torch.cat([answered, torch.zeros(3, 3)]), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2


def test_letters_need_options_and_other_ways_are_unknown():
    with pytest.raises(ValueError, match=r"a.wav: zero_shot_by=letters needs options .* set protocol to mcq"):
        asked("letters", [clip()])
    with pytest.raises(ValueError, match=r"a.wav: has 27 options, .* 26 letters: set zero_shot_by to likelihood or"):
        asked("letters", [clip("dog"), clip(*map(str, range(27)))])
    assert asked("generation", [clip(*map(str, range(27)))]).num_letters == 27
    with pytest.raises(ValueError, match="choose one of likelihood, letters, generation"):
        asked("telepathy", [clip()])


def test_vectors_are_what_the_model_says(tiny_lalm, tones):
    clips = [Clip(str(tones / "test" / label / "0.wav"), options=("dog", "sea")) for label in ("low", "high")]
    for answers in ("likelihood", "letters", "generation"):
        extraction = ZeroShot(Backbone(tiny_lalm), clips, CLASSES, answers)
        extraction._lalm = lalm = Backbone(tiny_lalm).load()
        inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
        kept_BV = extraction.vectors(inputs).squeeze(1)
        if answers == "generation":
            said = generate_answers(lalm, inputs)
            torch.testing.assert_close(kept_BV, torch.stack([extraction._mentions(answer) for answer in said]))
        elif answers == "letters":
            torch.testing.assert_close(kept_BV, letter_log_likelihoods(lalm, inputs, 2))
        else:
            torch.testing.assert_close(kept_BV, label_log_likelihoods(lalm, inputs, CLASSES))


def test_every_piece_of_a_long_clip_answers(tiny_lalm, tmp_path, monkeypatch):
    backbone = Backbone(tiny_lalm, long_clips="split")  # the window is 5 s
    clips = [Clip(str(tone(tmp_path / f"{seconds}.wav", 300, seconds))) for seconds in (14, 9, 1)]
    said = iter(["dog", "rain", "rain, sea", "sea", "wind", "no idea"])  # 3 pieces, 2 pieces, 1
    monkeypatch.setattr(
        "calm_pl.training.zero_shot.generate_answers", lambda _, inputs: [next(said) for _ in inputs.last_token_B]
    )
    extraction = ZeroShot(backbone, clips, CLASSES, "generation", backbone.load())
    processor = backbone.clip_processor()
    kept_BV = extraction.vectors(processor(clips, [processor.load(clip) for clip in clips])).squeeze(1)
    found_BC = extraction.probabilities(kept_BV, clips)
    assert found_BC.tolist() == [[0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]
    assert extraction.store_key() != asked("generation", clips).store_key()


@pytest.mark.parametrize("answers", ["likelihood", "letters", "generation"])
def test_fit_and_test_ask_as_configured(tiny_lalm, tones, tmp_path, answers):
    model = tmp_path / "model.yaml"
    model.write_text("classifier: calm\nmethods:\n  calm: {class_path: calm_pl.methods.calm.Calm}\n")
    arguments = [
        *("fit", "--data", "folder", "--backbone", tiny_lalm, "--model", str(model)),
        *("--data.recipe.init_args.data_dir", str(tones), "--data.shots", "2", "--data.num_workers", "0"),
        *("--data.protocol", "mcq", "--data.num_options", "2", "--model.zero_shot_by", answers),
        *("--run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"),
    ]
    assert cli.main(arguments) in (0, None)
    results = json.loads(Path(tmp_path / "run" / "results.json").read_text())
    assert results["protocol"] == "mcq" and 0 <= results["methods"]["zero_shot"]["accuracy"] <= 1


@pytest.fixture
def asked_tones(tones, tmp_path) -> Path:
    """The clips with questions of their own, in a manifest and, those for testing, in shards."""
    pytest.importorskip("webdataset")
    clips = mcq(read_manifest(tones), ["high", "low", "middle"], num_options=2)
    write_manifest(clips, tmp_path / "clips.jsonl")
    write_shards([clip for clip in clips if clip.split == "test"], tmp_path / "shards", per_shard=4)
    return tmp_path


def test_clips_of_a_stream_are_asked_about_within_their_options(tiny_lalm, asked_tones):
    run, stream = asked_tones / "run", asked_tones / "stream"
    asking = ("--data.protocol", "mcq", "--model.zero_shot_by", "letters", "--data.within_options", "true")
    calm(
        "fit", "--data", "manifest", "--data.recipe.init_args.data_dir", asked_tones / "clips.jsonl", *asking,
        "--backbone", tiny_lalm, "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--run_dir", run,
        "--model", "formula", "--model.zero_shot", "true", "--data.shots", "2", "--data.store_dtype", "float32",
    )  # fmt: skip
    streamed = (
        "test", "--ckpt_path", run / "checkpoints/last.ckpt", "--data", "shards",
        "--data.recipe.init_args.data_dir", asked_tones / "shards", "--data.store", "none", "--run_dir", stream,
    )  # fmt: skip
    calm(*streamed, "--data.num_workers", "1")
    kept, passed = (json.loads((folder / "results.json").read_text())["methods"] for folder in (run, stream))
    assert list(passed) == list(kept) and next(iter(passed)) == "zero_shot"
    for name, known in kept.items():
        assert passed[name]["accuracy"] == known["accuracy"]
        assert passed[name]["nll"] == pytest.approx(known["nll"], abs=1e-3)
    with pytest.raises(SystemExit, match=r"shards/clips-.*wav: comes with answer options, .* set protocol=mcq"):
        calm(*streamed, "--data.protocol", "open", "--data.within_options", "false")
