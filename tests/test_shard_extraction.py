"""Extraction from tar shards: the same vectors under the same keys, and streams that are tested without a store."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from calm_pl import cli
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import ClipProcessor
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.data import stream
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Recipe, Shards
from calm_pl.data.shard_writer import write_shards
from calm_pl.data.shards import ShardClip, ShardClips
from calm_pl.data.stream import ShardBatches
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.run.folder import RunFolder
from calm_pl.training.module import CalmModule
from calm_pl.training.trainer import CalmTrainer
from tests.conftest import tone
from tests.extracting import QUIET, in_two_ranks


@pytest.fixture(scope="module")
def tone_shards(tones, tmp_path_factory) -> Path:
    """The test clips in three shards, one clip of which is no sound."""
    folder = tmp_path_factory.mktemp("shards")
    broken = folder / "broken.wav"
    broken.write_bytes(b"RIFF but no sound")
    clips = [clip for clip in read_manifest(tones) if clip.split == "test"]
    write_shards(clips, folder / "tar", per_shard=4)
    with tarfile.open(folder / "tar" / "clips-000009.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(broken, "00000099.wav")
    return folder / "tar"


def extract_shards(shards: Path, model: str, root: Path, num_workers: int = 2, **options: object) -> None:
    pytest.importorskip("webdataset")
    recipe = Shards(str(shards))
    data = AudioEpisodeDataModule(recipe, Backbone(model), batch_size=2, store=str(root), num_workers=num_workers)
    module = CalmModule({"sav": SAV()}, "sav")
    CalmTrainer(**QUIET, **{"devices": 1, **options}).extract(module, data)


def extract_shards_in_two_ranks(*arguments: object) -> None:
    extract_shards(*arguments, devices=2, strategy="ddp")


def test_shards_fill_the_store_under_the_files_keys(tone_shards, tones, tiny_lalm, tmp_path, capsys):
    extract_shards(tone_shards, tiny_lalm, tmp_path / "heads")
    told = capsys.readouterr()
    assert "00000099.wav" in told.err and "1 clips or shards cannot be used" in told.out
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    test = [clip for clip in clips if clip.split == "test"]
    keys = store.clip_keys(test)
    assert store.missing(keys) == []
    direct_NKD = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(test)
    torch.testing.assert_close(store.read(keys), direct_NKD, atol=2e-3, rtol=2e-3)
    in_two_ranks(extract_shards_in_two_ranks, tone_shards, tiny_lalm, tmp_path / "two")
    assert torch.equal(HeadStore(backbone.store_key(), tmp_path / "two").read(keys), store.read(keys))


def test_an_extraction_tells_once_of_clips_that_are_cut(tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    for number, seconds in enumerate((6.0, 1.0, 7.0)):  # the window is 5 s
        tone(tmp_path / "files" / "low" / f"{number}.wav", 300 + number, seconds)
    clips = read_manifest(tmp_path / "files")
    write_shards(clips, tmp_path / "shards")
    for recipe in (Shards(str(tmp_path / "shards")), Folder(str(tmp_path / "files"))):
        data = AudioEpisodeDataModule(recipe, Backbone(tiny_lalm), num_workers=0, store=str(tmp_path / "heads"))
        with pytest.warns(UserWarning, match="2 of 3 clips are longer") as told:
            CalmTrainer(**QUIET, devices=1).extract(CalmModule({"sav": SAV()}, "sav"), data)
        assert sum("longer than" in str(warning.message) for warning in told) == 1


def test_of_stored_shards_nothing_is_decoded(tone_shards, tiny_lalm, tmp_path, monkeypatch, capsys):
    decoded, run = [], []
    load, forward = ClipProcessor.load, FrozenLALM.forward
    monkeypatch.setattr(ClipProcessor, "load", lambda self, clip: decoded.append(clip) or load(self, clip))
    monkeypatch.setattr(FrozenLALM, "forward", lambda self, inputs: run.append(1) or forward(self, inputs))
    extract_shards(tone_shards, tiny_lalm, tmp_path / "heads", num_workers=0)
    assert (len(decoded), len(run)) == (10, 5)
    told = last_lines(capsys)
    decoded.clear()
    run.clear()
    extract_shards(tone_shards, tiny_lalm, tmp_path / "heads", num_workers=0)
    assert (len(decoded), len(run)) == (1, 0)  # that which is no sound
    assert last_lines(capsys) == told  # it is named again


def last_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [stream.splitlines()[-1] for stream in capsys.readouterr()]


def test_shards_that_hold_nothing_to_hear_are_an_error(tone_shards, tiny_lalm, tmp_path):
    with pytest.raises(ValueError, match=r"nothing could be read: .*00000099\.wav"):
        extract_shards(tone_shards / "clips-000009.tar", tiny_lalm, tmp_path / "heads")


def test_an_unknown_scheme_is_told_by_the_command(tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    address = ["--data.recipe.init_args.data_dir", "hdfs://x/y.tar", "--data.store", str(tmp_path / "heads")]
    with pytest.raises(SystemExit, match=r"^calm: error: hdfs://x/y\.tar: .*'pipe:hdfs dfs -cat "):
        cli.main(["extract", "--data", "shards", *address, "--backbone", str(tiny_lalm)])


def test_a_shard_with_a_missing_clip_is_run_in_the_batches_of_an_unbroken_run(tone_shards, tiny_lalm, tmp_path):
    extract_shards(tone_shards, tiny_lalm, tmp_path / "unbroken")
    key = Backbone(tiny_lalm).store_key()
    whole, broken = (HeadStore(key, tmp_path / name) for name in ("unbroken", "broken"))
    load = Backbone(tiny_lalm).clip_processor().load
    keys = [item.key for item in ShardClips(str(tone_shards), load) if isinstance(item, ShardClip)]
    broken.write(keys[1:6], whole.read(keys[1:6]))
    extract_shards(tone_shards, tiny_lalm, tmp_path / "broken")
    assert torch.equal(broken.read(keys), whole.read(keys))


def test_large_files_are_not_gathered(tone_shards, tiny_lalm, monkeypatch):
    monkeypatch.setattr(stream, "SORTED_BYTES", 0)
    batches = list(ShardBatches([str(tone_shards)], Backbone(tiny_lalm), batch_size=4))
    assert [len(batch) for batch in batches] == [1] * 9 + [0]


def listen(recipe: Recipe, model: str, folder: Path, store: str, fit: bool = False, **devices: object) -> None:
    """Test on a data set, after fitting if asked; leaves a run folder."""
    options = {"shots": None, "batch_size": 2, "num_workers": 0, "store_dtype": "float32"}
    data = AudioEpisodeDataModule(recipe, Backbone(model), store=store, **options)
    module = CalmModule({"sav": SAV(), "calm": Calm()}, "calm")
    trainer = CalmTrainer(**QUIET, **{"devices": 1, **devices}, default_root_dir=folder, callbacks=[RunFolder()])
    if fit:
        trainer.fit(module, datamodule=data)
        trainer.save_checkpoint(folder.parent / "last.ckpt")
    trainer.test(module, datamodule=data, ckpt_path=folder.parent / "last.ckpt", verbose=False)


def listen_in_two_ranks(*arguments: object) -> None:
    listen(*arguments, devices=2, strategy="ddp")


def outcome(folder: Path) -> tuple[dict[str, float], Counter[tuple[str, ...]]]:
    results = json.loads((folder / "results.json").read_text())
    rows = csv.DictReader((folder / "predictions.csv").open())
    accuracy = {name: method["accuracy"] for name, method in results["methods"].items()}
    return accuracy, Counter((row["label"], row["prediction"], f"{float(row['confidence']):.2f}") for row in rows)


def test_a_stream_is_tested_without_a_store(tone_shards, tones, tiny_lalm, tmp_path):
    store = str(tmp_path / "heads")
    listen(Folder(str(tones)), tiny_lalm, tmp_path / "files", store, fit=True)
    before = sorted(Path(store).rglob("*"))
    listen(Shards(str(tone_shards)), tiny_lalm, tmp_path / "stream", "none")
    in_two_ranks(listen_in_two_ranks, Shards(str(tone_shards)), tiny_lalm, tmp_path / "two", "none")
    assert outcome(tmp_path / "stream") == outcome(tmp_path / "two") == outcome(tmp_path / "files")
    assert outcome(tmp_path / "two")[0].keys() == {"zero_shot", "sav", "calm"}
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["splits"]["test"] == 9 and "00000099.wav" in results["skipped"][0]["audio"]
    assert sorted(Path(store).rglob("*")) == before and not Path("none").exists()


def test_no_support_is_drawn_from_a_stream(tone_shards, tones, tiny_lalm, tmp_path):
    with pytest.raises(ValueError, match="fit on files"):
        listen(Shards(str(tone_shards)), tiny_lalm, tmp_path / "run", "none", fit=True)
    with pytest.raises(ValueError, match="store none is for"):
        listen(Folder(str(tones)), tiny_lalm, tmp_path / "run", "none", fit=True)
