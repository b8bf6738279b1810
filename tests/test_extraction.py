"""Extraction as Lightning's predict: the same store however it was filled, and nothing computed twice."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calm_pl import cli
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.precision import arithmetic
from calm_pl.backbone.processing import ClipProcessor
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder
from calm_pl.data.stream import ClipBatches
from calm_pl.headstore import HeadStore, HeadStoreError
from calm_pl.training import extraction_data
from calm_pl.training.extraction import HeadExtraction, StoreWriter, extract_missing
from calm_pl.training.extraction_data import ClipDataModule, unusable_clips
from calm_pl.training.trainer import CalmTrainer
from tests.conftest import tone
from tests.extracting import PROCESSES, QUIET, fill, fill_in_two_ranks, in_process, in_two_ranks, stored, trainer


def test_the_store_holds_what_the_model_says(unbroken, tones, tiny_lalm):
    direct_NKD = FrozenLALM.from_pretrained(tiny_lalm).head_outputs(read_manifest(tones))
    torch.testing.assert_close(unbroken, direct_NKD, atol=2e-3, rtol=2e-3)  # kept as float16


def test_two_ranks_fill_the_same_store(unbroken, tones, tiny_lalm, tmp_path):
    in_two_ranks(fill_in_two_ranks, tones, tiny_lalm, tmp_path / "heads")
    assert torch.equal(stored(tones, tiny_lalm, tmp_path / "heads"), unbroken)


def test_a_rank_without_a_batch_waits_for_the_other(unbroken, tones, tiny_lalm, tmp_path):
    in_two_ranks(fill_in_two_ranks, tones, tiny_lalm, tmp_path / "heads", 64)
    torch.testing.assert_close(stored(tones, tiny_lalm, tmp_path / "heads"), unbroken, atol=2e-3, rtol=2e-3)


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
    for _ in range(20):
        here, there = PROCESSES.Pipe()
        process = in_process(fill, tones, tiny_lalm, root, there)
        assert here.poll(timeout=300)
        time.sleep(moments.uniform(0.0, 0.6))
        process.kill()
        process.join()
        store = HeadStore(Backbone(tiny_lalm).store_key(), root)
        if not store.missing(store.clip_keys(clips)):  # nothing is left to break off
            shutil.rmtree(root)
    fill(tones, tiny_lalm, root)
    assert torch.equal(stored(tones, tiny_lalm, root), unbroken)


# In this process


def test_what_was_computed_before_an_error_is_kept(unbroken, tones, tiny_lalm, tmp_path, monkeypatch):
    """The last batch before it too, which waits for the next one before it is written."""
    passes = []

    def vectors(self: HeadExtraction, inputs: Any) -> torch.Tensor:
        if len(passes) == 3:
            raise RuntimeError("the cat pulled the plug")
        passes.append(len(inputs.last_token_B))
        return self.lalm.forward(inputs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the cat"):
        patch.setattr(HeadExtraction, "vectors", vectors)
        fill(tones, tiny_lalm, tmp_path)
    assert len(HeadStore(Backbone(tiny_lalm).store_key(), tmp_path)) == sum(passes) == 6
    fill(tones, tiny_lalm, tmp_path)
    assert torch.equal(stored(tones, tiny_lalm, tmp_path), unbroken)


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
    # Meanwhile another run stores the first clip of the third batch, by a plan of its own that cannot use that batch.
    stored = [clip for clip in various if Path(clip.audio).name == planned[2][0]]
    extract_missing(trainer(), stored, extraction, killed, batch_size=4)
    runs.clear()
    extract_missing(trainer(), various, extraction, HeadStore.open(killed.folder), batch_size=4)
    assert runs == planned[2:]
    rows = [row for row, clip in enumerate(various) if clip not in stored]
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


def test_weights_that_change_meanwhile_leave_nothing_under_the_old_ones(tones, tiny_lalm, tmp_path):
    model = Path(shutil.copytree(tiny_lalm, tmp_path / "model"))
    clips, backbone = read_manifest(tones / "train"), Backbone(str(model))
    store = HeadStore(backbone.store_key("float32", tmp_path / "heads"), tmp_path / "heads")
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(HeadStoreError, match="the files of model changed while this ran"):
        extract_missing(trainer(), clips, HeadExtraction(backbone), store)
    assert len(store) == 0


def data_batches(data: ClipDataModule) -> ClipBatches:
    return ClipBatches(data.clips, data.keys, data.wanted, [data.wanted], data.backbone, data.stamps)


def test_what_another_node_keeps_to_itself_is_told_with_the_way_out(tones, tiny_lalm, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction_data, "LOOK_AGAIN_AFTER", (0, 0))
    backbone = Backbone(tiny_lalm)
    data = ClipDataModule(read_manifest(tones / "train"), backbone, HeadStore(backbone.store_key(), tmp_path))
    data.setup()
    with pytest.raises(HeadStoreError, match=rf"not in {data.store.folder}.* set CALM_STORE"):
        unusable_clips(data)


@pytest.mark.parametrize(
    "limit", [("limit_predict_batches", 2), ("limit_predict_batches", 0.2), ("fast_dev_run", True)]
)
def test_an_extraction_of_a_few_batches_asks_for_no_more(tones, tiny_lalm, tmp_path, limit):
    data = AudioEpisodeDataModule(
        Folder(str(tones)), Backbone(tiny_lalm), store=str(tmp_path), num_workers=0, batch_size=2
    )
    CalmTrainer(**QUIET, devices=1, **dict([limit])).extract(None, data)
    assert 0 < len(data.make_store("float32")) < 21


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


def test_a_lost_worker_is_told_in_one_line(tones, tiny_lalm, tmp_path, monkeypatch):
    load = ClipProcessor.load
    here = os.getpid()

    def out_of_memory(self, clip):
        if os.getpid() != here and clip.label == "middle":
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, clip)

    monkeypatch.setattr(ClipProcessor, "load", out_of_memory)
    recipe = ["--data", "folder", "--data.recipe.init_args.data_dir", str(tones), "--data.num_workers", "1"]
    with pytest.raises(SystemExit, match=r"^calm: error: a process that decodes clips was killed: .*DataLoader worker"):
        cli.main(["extract", *recipe, "--backbone", tiny_lalm, "--data.store", str(tmp_path / "heads")])
