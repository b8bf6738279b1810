"""Films in a model that sees: the three modalities end to end, long ones, bad ones, and those in shards."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.classifier import CalmClassifier
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.recipes import Shards
from calm_pl.data.shard_writer import write_shards
from calm_pl.headstore import HeadStore
from calm_pl.training.module import CalmModule
from calm_pl.training.trainer import CalmTrainer
from tests.conftest import RATE

pytest.importorskip("av")

from calm_pl.video import load_frames
from examples.audiovisual import write_film
from tests.test_video import grey, tone, write_sound


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("torchvision") is None:
        pytest.skip("Qwen2.5-Omni needs torchvision")
    from tests.families import FAMILIES

    folder = tmp_path_factory.mktemp("omni")
    FAMILIES["qwen2.5-omni"].write(folder)
    return folder


def test_sound_and_pictures_are_interleaved_by_two_seconds(omni, tmp_path):
    path = str(write_film(tmp_path / "long.mp4", grey(5.0), tone(5.0)))
    processor = Backbone(str(omni), modality="audiovisual", frame_rate=1.0).clip_processor()
    processor.max_seconds = 30.0  # the tiny checkpoint's window is two seconds
    processor.cut_window = False
    processor.extractor.n_samples, processor.extractor.nb_max_frames = 30 * RATE, 3000
    inputs = processor([Clip(path)], [processor.load(Clip(path))])
    text = processor.tokenizer.decode(inputs.model_inputs["input_ids"][0])
    order = [token for token in text.replace("<|AUDIO|>", "|A").replace("<|VIDEO|>", "|V").split("|") if token in "AV"]
    turns = [token for i, token in enumerate(order) if token and (i == 0 or order[i - 1] != token)]
    assert turns == ["V", "A"] * 3  # 0 to 2 s, 2 to 4 s, 4 to 5 s
    assert bool(inputs.model_inputs["use_audio_in_video"])
    assert "<|vision_bos|><|audio_bos|>" in text


def test_a_version_of_transformers_that_reads_no_films_is_told(omni, monkeypatch):
    from transformers.processing_utils import OmniModalProcessorMixin

    monkeypatch.delattr(OmniModalProcessorMixin, "load_audio_from_video")
    assert Backbone(str(omni)).clip_processor()
    with pytest.raises(
        BackboneError, match=r"Qwen2_5OmniProcessor reads films from transformers 5\.23 on, and this is"
    ):
        Backbone(str(omni), modality="video").clip_processor()


@pytest.mark.parametrize("modality", ["video", "audiovisual"])
def test_long_films_are_split_by_time_and_averaged(omni, tmp_path, modality):
    whole, split = (FrozenLALM.from_pretrained(omni, modality=modality, long_clips=way) for way in ("cut", "split"))
    long, short = (str(write_film(tmp_path / f"{s}.mkv", grey(s), tone(s))) for s in (5.0, 1.0))  # the window is 2 s
    heads_NKD = split.head_outputs([Clip(long, start=0.25), Clip(short)], batch_size=2)
    end = 0.25 + split.processor.content.seconds(Clip(long, start=0.25))
    thirds = np.linspace(0.25, end, 4).tolist()
    pieces_NKD = whole.head_outputs([Clip(long, start=a, end=b) for a, b in pairwise(thirds)], batch_size=1)
    assert (pieces_NKD[0] - pieces_NKD[2]).abs().max() > 1e-3
    torch.testing.assert_close(heads_NKD[0], pieces_NKD.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(heads_NKD[1:], whole.head_outputs([short]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("extension", ["mp4", "webm", "avi"])
def test_pieces_beyond_the_pictures_show_the_last_of_them(omni, tmp_path, extension):
    film = str(write_film(tmp_path / f"short.{extension}", grey(1.0), None))
    soundfile.write(tmp_path / "long.wav", tone(5.3), RATE)
    clip = Clip(str(tmp_path / "long.wav"), video=film)
    processor = Backbone(str(omni), modality="audiovisual", long_clips="split").clip_processor()
    pieces = processor.load(clip)
    whole_F3HW = load_frames(film, 10.0)
    for waveform_S, _ in pieces:
        assert len(waveform_S) == pytest.approx(5.3 / 3 * RATE, abs=2)
    for _, frames_F3HW in pieces[1:]:
        assert torch.equal(frames_F3HW, whole_F3HW[-1:])
    if extension == "mp4":
        lalm = FrozenLALM.from_pretrained(omni, modality="audiovisual", long_clips="split")
        assert torch.isfinite(lalm.head_outputs([clip])).all()


def test_long_silent_films_are_counted_where_they_are_cut(omni, tmp_path):
    films = [Clip(str(write_film(tmp_path / f"{s}.mp4", grey(s), None))) for s in (3.0, 1.0)]
    processor = Backbone(str(omni), modality="video").clip_processor()
    with pytest.warns(UserWarning, match="1 of 2 clips are longer than the model's window of 2 s"):
        assert processor.warn_of_cut_clips(films) == [0]


def test_a_classifier_of_films_can_be_kept_and_used(omni, tmp_path):
    films, labels = [], []
    for label, level in (("dark", 20), ("bright", 220)):
        for number in range(3):
            frames_FHW3 = np.full((4, 56, 56, 3), level + number, dtype=np.uint8)
            films.append(str(write_film(tmp_path / f"{label}{number}.mp4", frames_FHW3, None)))
            labels.append(label)
    classifier = CalmClassifier(device="cpu").fit(films[1:], labels[1:], Backbone(str(omni), modality="video"))
    classifier.save_pretrained(tmp_path / "kept")
    assert CalmClassifier.from_pretrained(tmp_path / "kept", device="cpu").predict(films[:1]) == ["dark"]


def test_options_that_need_sound_are_refused_without_it(omni, tmp_path):
    with pytest.raises(BackboneError, match="with modality video nothing is heard; read the decoder"):
        FrozenLALM.from_pretrained(omni, modality="video", heads="both")
    pooled = FrozenLALM.from_pretrained(omni, modality="video", pooling="audio")
    with pytest.raises(BackboneError, match="there are no audio tokens in the decoder"):
        pooled.head_outputs([str(write_film(tmp_path / "a.mp4", grey(0.5), None))])


def test_bad_films_are_left_out_and_named_in_the_results(omni, tmp_path, capsys):
    """By the command line, as a user would: one silent film, one sound without pictures, one torn file."""
    from calm_pl import cli

    for label, level in (("dark", 20), ("bright", 220)):
        for number in range(4):
            frames_FHW3 = np.full((4, 56, 56, 3), level + number, dtype=np.uint8)
            write_film(tmp_path / "films" / label / f"{number}.mp4", frames_FHW3, tone(0.4))
    bad = tmp_path / "films" / "dark"
    write_film(bad / "silent.mp4", grey(0.4), None)
    write_sound(bad / "blind.m4a", "aac", "ipod", tone(0.4))
    (bad / "torn.mp4").write_bytes((bad / "0.mp4").read_bytes()[:700])
    model = tmp_path / "model.yaml"
    model.write_text("classifier: calm\nzero_shot: true\nmethods:\n  calm: {class_path: calm_pl.methods.calm.Calm}\n")
    arguments = [
        *("fit", "--data", "folder", "--backbone", str(omni), "--model", str(model)),
        *("--data.recipe.init_args.data_dir", str(tmp_path / "films"), "--data.shots", "null"),
        *("--data.backbone.modality", "audiovisual", "--data.num_workers", "0"),
        *("--run_dir", str(tmp_path / "run"), "--data.store", str(tmp_path / "heads")),
    ]
    assert cli.main(arguments) in (0, None)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    reasons = {Path(entry["audio"]).name: entry["reason"] for entry in results["skipped"]}
    assert reasons.keys() == {"silent.mp4", "blind.m4a", "torn.mp4"}
    assert "no sound track" in reasons["silent.mp4"] and "no pictures" in reasons["blind.m4a"]
    assert set(results["methods"]) == {"zero_shot", "calm"}


@pytest.mark.parametrize("modality", ["audio", "video", "audiovisual"])
def test_films_from_shards_are_heard_and_seen_as_files_are(omni, tmp_path, modality, capsys):
    pytest.importorskip("webdataset")
    sound, film, other = (str(tmp_path / name) for name in ("sound.wav", "film.MP4", "other.webm"))
    soundfile.write(sound, tone(1.5)[::-1], RATE)
    write_film(Path(film), grey(1.5), tone(1.5))
    write_film(Path(other), grey(1.0)[::-1], tone(1.0))
    clips = [
        *(Clip(film), Clip(film, video=film), Clip(film, start=0.5, end=1.25), Clip(sound, video=film)),
        *(Clip(other), Clip(film, video=other), Clip(sound, start=0.25, end=1.0, video=film)),
    ]
    torn, cut = tmp_path / "torn.mp4", tmp_path / "cut.webm"  # a header tells of the first; of the second, decoding
    torn.write_bytes(Path(film).read_bytes()[:700])
    whole = write_film(tmp_path / "whole.webm", grey(3.0), tone(3.0)).read_bytes()
    cut.write_bytes(whole[: len(whole) // 5])
    unusable = [Clip(str(torn)), Clip(sound, video=str(torn)), Clip(str(cut)), Clip(str(torn), video=film)]
    (shard,), errors = write_shards([*clips, *unusable], tmp_path / "tar")
    assert [error.path for error in errors] == [str(torn)] * 3

    backbone = Backbone(str(omni), modality=modality)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    data = AudioEpisodeDataModule(Shards(str(shard.parent)), backbone, batch_size=3, store=str(store.root))
    trainer = CalmTrainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.extract(CalmModule({"sav": SAV()}, "sav"), data)
    told = capsys.readouterr()
    assert "1 clips or shards cannot be used" in told.out and f"{shard}/00000009.webm: truncated" in told.err
    if modality == "audio":
        clips = [replace(clip, video=None) for clip in clips]
    keys = store.clip_keys(clips)
    assert store.missing(keys) == []
    direct_NKD = backbone.load().head_outputs(clips, batch_size=1)
    torch.testing.assert_close(store.read(keys), direct_NKD, atol=2e-3, rtol=2e-3)


def test_the_example_finds_that_both_together_tell_more(monkeypatch, tmp_path):
    if find_spec("torchvision") is None:
        pytest.skip("Qwen2.5-Omni needs torchvision")
    from examples import audiovisual

    monkeypatch.setattr(audiovisual, "TEST_FILMS", 3)
    accuracy = {name: methods["calm"]["accuracy"] for name, methods in audiovisual.run(tmp_path).items()}
    assert accuracy["audiovisual"] > max(accuracy["audio"], accuracy["video"])
