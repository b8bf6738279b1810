"""Extraction as Lightning's predict: the same store however it was filled, and nothing computed twice."""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import random
import shutil
import socket
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import ClipProcessor, LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.clip import Clip
from calm_pl.data import stream
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Recipe, Shards
from calm_pl.data.shards import ShardClip, ShardClips, write_shards
from calm_pl.data.stream import ClipBatches, ShardBatches
from calm_pl.headstore import HeadStore, HeadStoreError
from calm_pl.methods.calm import Calm
from calm_pl.training import extraction
from calm_pl.training.batch_size import fitting_batch_size, run_in_halves
from calm_pl.training.extraction import (
    ClipDataModule,
    HeadExtraction,
    StoreWriter,
    arithmetic,
    extract_missing,
    unusable_clips,
)
from calm_pl.training.module import CalmModule
from calm_pl.training.run_folder import RunFolder
from calm_pl.training.trainer import CalmTrainer
from tests.conftest import tone
from tests.families import FAMILIES

# Forks of a process that has imported everything and started nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_extraction"])
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fill(folder: Path, model: str, root: Path, ready: Connection | None = None, **options: object) -> None:
    """Extract the clips of a folder."""
    clips, backbone = read_manifest(folder), Backbone(model)
    store = HeadStore(backbone.store_key(), root)
    trainer = L.Trainer(callbacks=[StoreWriter(store)], **QUIET, **{"devices": 1, **options})
    data = ClipDataModule(clips, backbone, store, batch_size=2)
    if ready:
        ready.send_bytes(b".")
    trainer.predict(HeadExtraction(backbone), datamodule=data, return_predictions=False)


def in_process(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def in_two_ranks(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in two processes of one torchrun job."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [in_process(as_rank, rank, port, function, arguments) for rank in range(2)]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0


def as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """What torchrun tells a process of itself."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**known, **job}.items()})
    torch.set_num_threads(1)
    function(*arguments)


def fill_in_two_ranks(folder: Path, model: str, root: Path) -> None:
    fill(folder, model, root, devices=2, strategy="ddp")


def stored(folder: Path, model: str, root: Path) -> torch.Tensor:
    clips = read_manifest(folder)
    store = HeadStore(Backbone(model).store_key(), root)
    return store.read(store.clip_keys(clips))


@pytest.fixture(scope="module")
def unbroken(tones, tiny_lalm, tmp_path_factory) -> torch.Tensor:
    root = tmp_path_factory.mktemp("unbroken") / "heads"
    fill(tones, tiny_lalm, root)
    return stored(tones, tiny_lalm, root)


def test_the_store_holds_what_the_model_says(unbroken, tones, tiny_lalm):
    direct_NKD = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(read_manifest(tones))
    torch.testing.assert_close(unbroken, direct_NKD, atol=2e-3, rtol=2e-3)  # kept as float16


def test_two_ranks_fill_the_same_store(unbroken, tones, tiny_lalm, tmp_path):
    in_two_ranks(fill_in_two_ranks, tones, tiny_lalm, tmp_path / "heads")
    assert torch.equal(stored(tones, tiny_lalm, tmp_path / "heads"), unbroken)


def test_two_runs_at_once_do_not_disturb_each_other(unbroken, tones, tiny_lalm, tmp_path):
    processes = [in_process(fill, tones, tiny_lalm, tmp_path / "heads") for _ in range(2)]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    assert torch.equal(stored(tones, tiny_lalm, tmp_path / "heads"), unbroken)


def test_a_killed_extraction_goes_on_where_it_was(unbroken, tones, tiny_lalm, tmp_path):
    moments = random.Random(0)
    root = tmp_path / "heads"
    clips = read_manifest(tones)
    store = HeadStore(Backbone(tiny_lalm).store_key(), root)
    keys = store.clip_keys(clips)
    for _ in range(3):
        here, there = PROCESSES.Pipe()
        process = in_process(fill, tones, tiny_lalm, root, there)
        assert here.poll(timeout=300)
        time.sleep(moments.uniform(0.0, 0.6))
        process.kill()
        process.join()
        held = len(keys) - len(store.missing(keys))
    fill(tones, tiny_lalm, root)
    assert held <= len(clips) and torch.equal(stored(tones, tiny_lalm, root), unbroken)


# In this process


def trainer(**options: object) -> L.Trainer:
    return L.Trainer(**QUIET, **{"devices": 1, **options})


def test_only_what_is_missing_is_run(tones, tiny_lalm, tmp_path, monkeypatch):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    assert extract_missing(trainer(), clips[:8], HeadExtraction(backbone), store, batch_size=2) == {}
    run = []
    forward = FrozenLALM.forward
    monkeypatch.setattr(FrozenLALM, "forward", lambda self, inputs: run.append(1) or forward(self, inputs))
    extract_missing(trainer(), clips, HeadExtraction(backbone), store, batch_size=1)
    assert len(run) == len(clips) - 8
    run.clear()
    extract_missing(trainer(), clips, HeadExtraction(backbone), store, batch_size=1)
    assert run == []


def plans(store: HeadStore) -> list[Path]:
    return sorted(store.folder.glob("plan-*.json"))


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """The batches that are run, as names of files."""
    batches: list[list[str]] = []
    run = ClipProcessor.__call__

    def told(self, clips, *rest):
        batches.append([Path(clip.audio).name for clip in clips])
        return run(self, clips, *rest)

    monkeypatch.setattr(ClipProcessor, "__call__", told)
    return batches


@pytest.fixture
def various(tmp_path) -> list[Clip]:
    """24 clips, each of another length."""
    paths = [tone(tmp_path / f"{index}.wav", 200 + 40 * index, 0.3 + 0.07 * (index * 7 % 24)) for index in range(24)]
    return [Clip(str(path)) for path in paths]


def killed_after(writes: int, monkeypatch) -> Any:
    """A context in which the process ends before its next write to the store."""
    done: list[int] = []
    write = HeadStore.write

    def written(self, *arguments):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(1)
        write(self, *arguments)

    context = monkeypatch.context()

    @contextlib.contextmanager
    def inside():
        with context as patch:
            patch.setattr(HeadStore, "write", written)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                yield

    return inside()


def test_some_new_clips_are_run_without_the_stored_ones(various, tiny_lalm, tmp_path, runs):
    extraction = HeadExtraction(Backbone(tiny_lalm))
    store = HeadStore(extraction.backbone.store_key(), tmp_path / "heads")
    extract_missing(trainer(), various[:20], extraction, store)
    assert sorted(map(len, runs)) == [4, 8, 8]
    runs.clear()
    extract_missing(trainer(), various, extraction, store)
    assert [sorted(batch) for batch in runs] == [["20.wav", "21.wav", "22.wav", "23.wav"]]


def test_a_killed_run_over_a_store_that_holds_a_part_goes_on_with_its_batches(
    various, tiny_lalm, tmp_path, runs, monkeypatch
):
    extraction = HeadExtraction(Backbone(tiny_lalm))
    stores = [HeadStore(extraction.backbone.store_key(), tmp_path / n, "float32") for n in ("unbroken", "killed")]
    unbroken, killed = stores
    for store in stores:
        extract_missing(trainer(), various[::3], extraction, store, batch_size=4)
    runs.clear()
    extract_missing(trainer(), various, extraction, unbroken, batch_size=4)
    planned = list(runs)
    keys = killed.clip_keys(various)
    runs.clear()
    with killed_after(2, monkeypatch):
        extract_missing(trainer(), various, extraction, killed, batch_size=4)
    assert len(killed.missing(keys)) == 8
    # Meanwhile another run stores one clip of the third batch, by a plan of its own that cannot use that batch.
    third = [clip for clip in various if Path(clip.audio).name in planned[2]]
    extract_missing(trainer(), third[:1], extraction, killed, batch_size=4)
    runs.clear()
    extract_missing(trainer(), various, extraction, HeadStore.open(killed.folder), batch_size=4)
    assert runs == planned[2:]
    rows = [row for row, clip in enumerate(various) if clip != third[0]]
    assert torch.equal(killed.read(keys)[rows], unbroken.read(keys)[rows])
    assert plans(killed)
    extract_missing(trainer(), [*various, Clip(str(tone(tmp_path / "new.wav", 900, 0.5)))], extraction, killed)
    assert len(plans(killed)) == 1  # of the last run alone


def test_plans_that_cannot_be_used_are_passed_over(various, tiny_lalm, tmp_path, runs, monkeypatch):
    extraction = HeadExtraction(Backbone(tiny_lalm))
    store = HeadStore(extraction.backbone.store_key(), tmp_path / "heads")
    with killed_after(1, monkeypatch):
        extract_missing(trainer(), various[:8], extraction, store, batch_size=4)
    (plan,) = plans(store)
    torn = plan.with_name(plan.name.replace("plan-0", "plan-1"))
    torn.write_bytes(plan.read_bytes()[:-3])
    missing = [various[index] for index in store.missing(store.clip_keys(various))]
    runs.clear()
    extract_missing(trainer(), missing, extraction, store, batch_size=3)  # of another batch size
    assert [len(batch) for batch in runs] == [3] * 6 + [2]
    assert len(plans(store)) == 2 and not torn.exists()


def test_nobody_is_decoded_beside_a_clip_that_cannot_be_used(various, tiny_lalm, tmp_path, runs, monkeypatch):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF but no sound")
    clips = [*various[:3], Clip(str(broken))]
    extraction = HeadExtraction(Backbone(tiny_lalm))
    store = HeadStore(extraction.backbone.store_key(), tmp_path / "heads")
    assert list(extract_missing(trainer(), clips, extraction, store)) == [3]
    decoded: list[str] = []
    load = ClipProcessor.load
    monkeypatch.setattr(ClipProcessor, "load", lambda self, clip: decoded.append(clip.audio) or load(self, clip))
    runs.clear()
    assert list(extract_missing(trainer(), clips, extraction, store)) == [3]
    assert (set(decoded), runs) == ({str(broken)}, [])


def test_a_changed_clip_and_a_changed_prompt_are_computed_anew(tones, tiny_lalm, tmp_path):
    import shutil

    folder = Path(shutil.copytree(tones, tmp_path / "data"))
    clips, backbone = read_manifest(folder), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    extract_missing(trainer(), clips, HeadExtraction(backbone), store)
    Path(clips[0].audio).write_bytes(Path(clips[-1].audio).read_bytes())
    before = store.clip_keys(clips)
    Path(clips[1].audio).write_bytes(Path(clips[1].audio).read_bytes()[:-200])
    assert store.missing(store.clip_keys(clips)) == [1] and store.clip_keys(clips)[2:] == before[2:]
    other = Backbone(tiny_lalm, prompt="{question}")
    assert len(HeadStore(other.store_key(), tmp_path / "heads").missing(before)) == len(set(before))


def test_clips_that_cannot_be_used_are_told_with_the_reason(tones, tiny_lalm, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    clips = [*read_manifest(tones)[:3], Clip(str(tmp_path / "empty.wav")), Clip(str(tmp_path / "absent.wav"))]
    backbone = Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    reasons = extract_missing(trainer(), clips, HeadExtraction(backbone), store)
    assert list(reasons) == [3, 4] and "empty.wav" in reasons[3] and "no such file" in reasons[4]
    assert store.missing(store.clip_keys(clips)) == [3, 4]


def test_files_of_the_same_bytes_that_cannot_be_used_are_all_told(tones, tiny_lalm, tmp_path):
    folder = Path(shutil.copytree(tones / "train", tmp_path / "tones"))
    for name in ("empty-1.wav", "empty-2.wav"):
        (folder / "low" / name).touch()
    clips, backbone = read_manifest(folder), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    for _ in range(2):
        reasons = extract_missing(trainer(), clips, HeadExtraction(backbone), store)
        assert [Path(clips[index].audio).name for index in reasons] == ["empty-1.wav", "empty-2.wav"]
        assert all("empty" in reason for reason in reasons.values())


def test_a_file_that_changes_meanwhile_leaves_nothing_under_its_old_bytes(tones, tiny_lalm, tmp_path):
    folder = Path(shutil.copytree(tones / "train", tmp_path / "tones"))
    clips, backbone = read_manifest(folder), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path / "heads")
    data = ClipDataModule(clips, backbone, store, batch_size=2)
    data.setup()
    shutil.copy(clips[1].audio, clips[0].audio)
    told: list[str] = []
    for batch in data_batches(data):
        told += batch.errors
    assert len(told) == 1 and "changed while this ran" in told[0] and clips[0].audio in told[0]


def data_batches(data: ClipDataModule) -> ClipBatches:
    return ClipBatches(data.clips, data.keys, data.wanted, [data.wanted], data.backbone, data.stamps)


def test_what_another_node_keeps_to_itself_is_told_with_the_way_out(tones, tiny_lalm, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "LOOK_AGAIN_AFTER", (0, 0))
    backbone = Backbone(tiny_lalm)
    data = ClipDataModule(read_manifest(tones / "train"), backbone, HeadStore(backbone.store_key(), tmp_path))
    data.setup()
    with pytest.raises(HeadStoreError, match=rf"not in {data.store.folder}.* set CALM_STORE"):
        unusable_clips(data)


def test_films_that_nobody_watches_are_no_part_of_a_clip(tones, tiny_lalm):
    data = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm))
    assert data.asked([Clip("a.wav", "low", video="a.mp4")])[0].video is None


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
def test_precision_is_the_trainers(tones, tiny_lalm, tmp_path, precision):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    exact_NKD = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(clips)
    store = HeadStore(backbone.store_key(arithmetic(precision)), tmp_path, dtype="float32")
    assert store.folder != HeadStore(backbone.store_key(arithmetic("32-true")), tmp_path, dtype="float32").folder
    extract_missing(trainer(precision=precision), clips, HeadExtraction(backbone), store)
    half_NKD = store.read(store.clip_keys(clips))
    assert torch.cosine_similarity(half_NKD, exact_NKD, dim=-1).min() > 0.999
    assert (half_NKD - exact_NKD).abs().max() > 1e-6


def test_an_unknown_precision_lists_the_known_ones(tones, tiny_lalm, tmp_path):
    backbone = Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with pytest.raises(ValueError, match="precision='64-true': backbones run in 32-true"):
        extract_missing(trainer(precision="64-true"), read_manifest(tones)[:2], HeadExtraction(backbone), store)


def test_workers_decode_the_same(unbroken, tones, tiny_lalm, tmp_path):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    data = ClipDataModule(clips, backbone, store, batch_size=2, num_workers=2)
    callbacks = [StoreWriter(store)]
    trainer(callbacks=callbacks).predict(HeadExtraction(backbone), datamodule=data, return_predictions=False)
    assert torch.equal(store.read(data.keys), unbroken)


# Shards


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
    assert "00000099.wav" in (told := capsys.readouterr().out) and "1 clips cannot be used" in told
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
    told = capsys.readouterr().out.splitlines()[-2:]
    decoded.clear()
    run.clear()
    extract_shards(tone_shards, tiny_lalm, tmp_path / "heads", num_workers=0)
    assert (len(decoded), len(run)) == (1, 0)  # that which is no sound
    assert capsys.readouterr().out.splitlines()[-2:] == told  # it is named again


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


# Memory


@pytest.fixture
def small_gpu(tiny_lalm) -> FrozenLALM:
    """A model on a device whose memory ends at three clips."""
    lalm = FrozenLALM.from_pretrained(tiny_lalm)

    def limit(module: torch.nn.Module, args: tuple, inputs: dict) -> None:
        if len(inputs["input_ids"]) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    lalm.model.register_forward_pre_hook(limit, with_kwargs=True)
    return lalm


def test_a_batch_that_does_not_fit_is_run_in_halves(small_gpu, unbroken, tones, tiny_lalm, tmp_path):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with pytest.warns(UserWarning, match="out of memory") as told:
        extract_missing(trainer(), clips, HeadExtraction(backbone, small_gpu), store, batch_size=8)
    assert sum("out of memory" in str(warning.message) for warning in told) == 1
    torch.testing.assert_close(store.read(store.clip_keys(clips)), unbroken, atol=2e-3, rtol=2e-3)


def test_pieces_of_long_clips_are_halved_too(small_gpu, tiny_lalm, tmp_path):
    clips = [Clip(str(tone(tmp_path / f"{index}.wav", 300 * (index + 1), 4.0 + 4 * index))) for index in range(4)]
    backbone = Backbone(tiny_lalm, long_clips="split")
    inputs = backbone.clip_processor()(clips, [backbone.clip_processor().load(clip) for clip in clips])
    assert max(len(part.last_token_B) for part in inputs.parts) == 4  # more than there is memory for
    store = HeadStore(backbone.store_key(), tmp_path, dtype="float32")
    with pytest.warns(UserWarning, match="out of memory with a batch of 4 clips"):
        extract_missing(trainer(), clips, HeadExtraction(backbone, small_gpu), store, batch_size=4)
    expected_NKD = FrozenLALM.from_pretrained(tiny_lalm, long_clips="split").head_outputs(clips)
    torch.testing.assert_close(store.read(store.clip_keys(clips)), expected_NKD, atol=1e-5, rtol=1e-5)


def test_clips_of_several_windows_are_halved_too(tmp_path):
    FAMILIES["audio-flamingo-3"].write(tmp_path / "model")
    lalm = FrozenLALM.from_pretrained(tmp_path / "model", heads="both")
    clips = [Clip(str(tone(tmp_path / f"{index}.wav", 300 * (index + 1), 1.0 + 2 * index))) for index in range(3)]

    def run(inputs: LALMInputs) -> torch.Tensor:
        if len(inputs.last_token_B) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return lalm.forward(inputs)

    sizes: list[int] = []
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    heads_NKD = run_in_halves(run, inputs, sizes.append)
    assert sizes == [3, 2] and inputs.windows_B.tolist() == [1, 2, 3]
    torch.testing.assert_close(heads_NKD, lalm.head_outputs(clips), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_alone_is_an_error(small_gpu, tones, tiny_lalm, tmp_path):
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    small_gpu.model.register_forward_pre_hook(full)
    backbone = Backbone(tiny_lalm)
    store = HeadStore(backbone.store_key(), tmp_path)
    with pytest.raises(BackboneError, match="batch of 1 clips"), pytest.warns(UserWarning, match="out of memory"):
        extract_missing(trainer(), read_manifest(tones)[:4], HeadExtraction(backbone, small_gpu), store)


def test_the_largest_batch_that_fits_is_found(small_gpu, tones, tmp_path):
    (tmp_path / "longest but empty.wav").write_bytes(b"")
    clips = [*read_manifest(tones), Clip(str(tmp_path / "longest but empty.wav"))]
    assert fitting_batch_size(small_gpu.forward, small_gpu.processor, clips) == 2


def test_auto_is_a_constant_on_cpu(unbroken, tones, tiny_lalm, tmp_path):
    clips, backbone = read_manifest(tones), Backbone(tiny_lalm)
    auto, eight = (HeadStore(backbone.store_key(), tmp_path / name) for name in ("auto", "eight"))
    extract_missing(trainer(), clips, HeadExtraction(backbone), auto, batch_size="auto")
    extract_missing(trainer(), clips, HeadExtraction(backbone), eight, batch_size=8)
    keys = auto.clip_keys(clips)
    assert torch.equal(auto.read(keys), eight.read(keys))
