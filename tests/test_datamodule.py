"""What is streamed: each clip once over all ranks, episodes that follow from the seed, no test clip in the support."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from calm_pl import AudioEpisodeDataModule, Backbone
from calm_pl.clip import Clip
from calm_pl.data import write_manifest
from calm_pl.data.episodes import EpisodeStream
from calm_pl.data.labelled import StoredHeads
from calm_pl.data.recipes import Folder, Manifest
from calm_pl.training.extraction import HeadExtraction, extract_missing


@pytest.fixture(scope="module")
def filled(tones, tiny_lalm) -> AudioEpisodeDataModule:
    data = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), shots=2, num_workers=0)
    data.prepare_data()
    data.setup()
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert extract_missing(trainer, data.clips, HeadExtraction(data.backbone), data.open_store("float32")) == {}
    return data


def test_support_and_test_share_nothing(filled):
    support = [filled.clips[i].audio for i in filled.usable("support")]
    test = [filled.clips[i].audio for i in filled.usable("test")]
    assert len(support) == 6 and len(test) == 9 and not set(support) & set(test)
    assert all("/train/" in file for file in support) and all("/test/" in file for file in test)


def test_copies_of_support_clips_are_told(tones, tiny_lalm, tmp_path):
    copied = Path(shutil.copytree(tones, tmp_path / "data"))
    shutil.copy(copied / "train/low/0.wav", copied / "test/low/again.wav")
    shutil.copy(copied / "train/low/0.wav", copied / "train/low/twice.wav")
    data = AudioEpisodeDataModule(Folder(str(copied)), Backbone(tiny_lalm), shots=None, num_workers=0)
    data.prepare_data()
    data.setup()
    with pytest.warns(UserWarning, match="copies, byte for byte, of support clips") as told:
        data.open_store("float32")
    said = str(told[0].message)
    assert "again.wav (test) is " in said and "twice.wav" in said and said.count(" is ") == 2


def test_validation_clips_are_not_training_clips(tiny_lalm, tmp_path):
    clips = [Clip(f"{tmp_path}/{n}.wav", "ab"[n % 2], "train", group=str(n)) for n in range(4)]
    clips.append(Clip(f"{tmp_path}/5.wav", "a", "val", group="0"))
    write_manifest(clips, tmp_path / "clips.jsonl")
    data = AudioEpisodeDataModule(Manifest(str(tmp_path / "clips.jsonl")), Backbone(tiny_lalm), shots=1)
    with pytest.warns(UserWarning, match="1 groups are in training and in validation: 0.* too good for it"):
        data.setup()


def test_one_class_is_nothing_to_tell_apart(tones, tiny_lalm, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(tones / split / "low", tmp_path / split / "low")
    with pytest.raises(ValueError, match=r"all training clips are of one class \(low\)"):
        AudioEpisodeDataModule(Folder(str(tmp_path)), Backbone(tiny_lalm), shots=1).setup()


def test_fewer_shots_are_part_of_more_shots(tones, tiny_lalm):
    drawn = []
    for shots in (1, 2, 4):
        data = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), shots=shots)
        data.setup()
        drawn.append({data.clips[i].audio for i in data.usable("support")})
    assert drawn[0] < drawn[1] < drawn[2]


def test_support_heads_come_with_their_labels(filled):
    support = filled.support()
    assert support.heads_BKD.shape == (6, 16, 16) and support.heads_BKD.dtype == torch.float32
    names = [Path(filled.clips[i].audio).parent.name for i in support.indices_B.tolist()]
    assert [filled.classes[label] for label in support.labels_B.tolist()] == names


@given(world_size=st.integers(1, 5), chunk=st.integers(1, 12))
def test_every_clip_is_seen_once_by_all_ranks_together(filled, world_size, chunk):
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        part = StoredHeads(filled.store, filled.keys, filled.labels, filled.usable("test"), rank, world_size, chunk)
        batches = list(part)
        assert len(batches) == len(part)
        seen.update(index for batch in batches for index in batch.indices_B.tolist())
    assert seen == Counter(filled.usable("test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "closed"}, "protocol='closed' is unknown: choose open or mcq"),
        ({"within_options": True}, "within_options is for protocol=mcq"),
        ({"batch_size": 0}, "batch_size=0: at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(tones, options, message):
    with pytest.raises(ValueError, match=message):
        AudioEpisodeDataModule(Folder(str(tones)), Backbone(), **options)


def test_mcq_lists_options_with_the_true_one_among_them(tones, tiny_lalm):
    def setup(**options) -> AudioEpisodeDataModule:
        data = AudioEpisodeDataModule(
            Folder(str(tones)), Backbone(tiny_lalm), protocol="mcq", num_options=2, **{"shots": 2, **options}
        )
        data.setup()
        return data

    data = setup()
    for clip in data.clips:
        assert clip.options is not None and len(clip.options) == 2 and clip.label in clip.options
        assert clip.question == f"What sound is this?\nA. {clip.options[0]} B. {clip.options[1]}"
    plain = setup(letters=False).clips[0]
    assert plain.question == "\n".join(["What sound is this?", *plain.options])
    again = {clip.audio: clip for clip in setup(seed=7, shots=1).clips}  # another support set, the same questions
    assert all(again[clip.audio] == clip for clip in data.clips if clip.audio in again)


def test_within_options_predicts_among_them_alone(tones, tiny_lalm):
    options = {"protocol": "mcq", "num_options": 2}
    data = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), shots=2, within_options=True, **options)
    data.setup()
    indices = torch.tensor(data.usable("test"))
    before_NC = torch.tensor([[0.5, 0.3, 0.2]]).repeat(len(indices), 1)
    after_NC = data.among_options(indices, before_NC)
    for row, clip in zip(after_NC, data.clips_at(indices.tolist()), strict=True):
        listed = [data.classes.index(option) for option in clip.options]
        assert row[listed].sum() == pytest.approx(1) and (row > 0).sum() == 2
        assert row[listed[0]] / row[listed[1]] == pytest.approx(before_NC[0, listed[0]] / before_NC[0, listed[1]])
    nowhere_NC = torch.eye(3)[[data.classes.index(_not_listed(data, i)) for i in indices.tolist()]]
    assert data.among_options(indices, nowhere_NC).sum(1).tolist() == pytest.approx([1.0] * len(indices))
    asked = data.protocol.description()
    assert (asked["num_options"], asked["options_seed"], asked["within_options"]) == (2, 0, True)
    free = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), shots=2, **options)
    assert torch.equal(free.among_options(indices, before_NC), before_NC)


def _not_listed(data: AudioEpisodeDataModule, position: int) -> str:
    return next(name for name in data.classes if name not in data.clips[position].options)


def test_a_manifests_own_options_are_the_mcq_protocol(tones, tiny_lalm, tmp_path):
    files = [(split, label, n) for split in ("train", "test") for label in ("low", "high") for n in range(2)]
    clips = [
        Clip(
            f"{tones}/{split}/{label}/{n}.wav", label, split, question="High?\nA. low B. high", options=("low", "high")
        )
        for split, label, n in files
    ]
    write_manifest(clips, tmp_path / "clips.jsonl")
    recipe = Manifest(str(tmp_path / "clips.jsonl"))
    with pytest.raises(ValueError, match="set protocol=mcq"):
        AudioEpisodeDataModule(recipe, Backbone(tiny_lalm), shots=1).setup()
    data = AudioEpisodeDataModule(recipe, Backbone(tiny_lalm), shots=1, protocol="mcq")
    data.setup()
    assert {clip.question for clip in data.clips} == {"High?\nA. low B. high"}


def test_a_test_label_unknown_to_training_is_named(tones, tiny_lalm, tmp_path):
    import shutil

    folder = Path(shutil.copytree(tones, tmp_path / "data"))
    (folder / "test" / "low").rename(folder / "test" / "buzz")
    data = AudioEpisodeDataModule(Folder(str(folder)), Backbone(tiny_lalm), shots=1)
    with pytest.raises(ValueError, match="no training clip has: buzz"):
        data.setup()


def test_a_class_without_usable_support_is_named(filled, tones, tiny_lalm):
    data = AudioEpisodeDataModule(Folder(str(tones)), Backbone(tiny_lalm), shots=1)
    data.setup()
    lost = next(i for i in data.usable("support") if "/low/" in data.clips[i].audio)
    with pytest.raises(ValueError, match="no usable support clip is left of low. .*gone.wav: broken"):
        data.leave_out({lost: "gone.wav: broken"})


# Episodes


@pytest.fixture(scope="module")
def pool() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 3, 4, generator=generator), torch.arange(60) % 6


def stream(pool, **options) -> EpisodeStream:
    return EpisodeStream(*pool, **{"way": 4, "shots": 2, "queries": 3, "count": 20, **options})


def test_episodes_are_n_way_k_shot(pool):
    heads_NKD, labels_N = pool
    for episode in stream(pool):
        assert len(set(episode.classes.tolist())) == 4
        assert episode.support_labels_S.bincount().tolist() == [2] * 4
        assert episode.query_labels_Q.bincount().tolist() == [3] * 4
        for vectors, labels in (
            (episode.support_SKD, episode.support_labels_S),
            (episode.queries_QKD, episode.query_labels_Q),
        ):
            rows = [(heads_NKD == vector).all(-1).all(-1).nonzero().item() for vector in vectors]
            assert labels_N[rows].tolist() == episode.classes[labels].tolist()
        assert not any((episode.support_SKD == query).all(-1).all(-1).any() for query in episode.queries_QKD)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (3, 2)])
def test_ranks_and_workers_share_the_same_episodes(pool, world_size, workers):
    alone = {episode.number: episode for episode in stream(pool)}
    seen = []
    for rank in range(world_size):
        part = stream(pool, rank=rank, world_size=world_size)
        seen += list(DataLoader(part, batch_size=None, num_workers=workers))
    assert sorted(episode.number for episode in seen) == list(range(20))
    for episode in seen:
        assert torch.equal(episode.queries_QKD, alone[episode.number].queries_QKD)


def test_another_seed_draws_other_episodes(pool):
    assert not torch.equal(stream(pool).draw(0).support_SKD, stream(pool, seed=1).draw(0).support_SKD)


def test_too_few_clips_or_classes_are_told(pool):
    with pytest.raises(ValueError, match="9 shots and 3 queries need 12 clips a class"):
        stream(pool, shots=9)
    with pytest.raises(ValueError, match="way=7: there are 6 classes"):
        stream(pool, way=7)
