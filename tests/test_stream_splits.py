"""Which clips of a stream a test counts: never those of training, and never none in silence."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from calm_pl.backbone.spec import Backbone
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Shards
from calm_pl.data.shard_writer import write_shards
from calm_pl.data.stream import ClipBatch, ShardBatches
from tests.test_shard_extraction import listen


def test_clips_of_other_splits_are_left_out_and_counted(tones, tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    write_shards(read_manifest(tones), tmp_path, per_shard=6)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    batches = list(ShardBatches(urls, Backbone(tiny_lalm), 4, split="test"))
    assert {clip.split for batch in batches for clip in batch.clips} == {"test"}
    counts = sum(len(batch) for batch in batches), sum(batch.left_out for batch in batches)
    assert counts == (9, 12)
    pinned = ClipBatch([], [], None, ["broken"], 1, 2).pin_memory()  # as a loader does where there is a GPU
    assert (pinned.errors, pinned.cut, pinned.left_out, len(pinned)) == (["broken"], 1, 2, 0)
    assert sum(len(batch) for batch in ShardBatches(urls, Backbone(tiny_lalm), 4)) == 21


@pytest.fixture(scope="module")
def fitted(tones, tiny_lalm, tmp_path_factory) -> Path:
    """A folder beside the checkpoint of a fit."""
    folder = tmp_path_factory.mktemp("fitted") / "files"
    listen(Folder(str(tones)), tiny_lalm, folder, str(folder.parent / "heads"), fit=True)
    return folder.parent


def test_a_test_on_a_stream_counts_its_test_clips(fitted, tones, tiny_lalm, tmp_path, capsys):
    write_shards(read_manifest(tones), tmp_path, per_shard=6)
    listen(Shards(str(tmp_path)), tiny_lalm, fitted / "stream", "none")
    assert "12 clips of other splits than test were left out" in capsys.readouterr().err
    assert len((fitted / "stream" / "predictions.csv").read_text().splitlines()) == 1 + 9


@pytest.mark.parametrize("kind", ["empty", "training"])
def test_a_stream_without_a_clip_to_test_is_an_error(fitted, tones, tiny_lalm, tmp_path, kind):
    if kind == "training":
        write_shards([replace(clip, split="train") for clip in read_manifest(tones)[:2]], tmp_path)
    else:
        tarfile.open(tmp_path / "none.tar", "w").close()
    with pytest.raises(ValueError, match="no clip was heard"):
        listen(Shards(str(tmp_path)), tiny_lalm, fitted / kind, "none")
