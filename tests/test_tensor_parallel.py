"""One model over two processes: the heads of one that is whole, every clip kept once, and what cannot be cut."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.tensor import DTensor

from calm_pl.backbone.answers import label_log_likelihoods
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import SAV
from calm_pl.clip import Clip
from calm_pl.data.datamodule import AudioEpisodeDataModule
from calm_pl.data.manifest import read_manifest
from calm_pl.data.recipes import Folder, Recipe, Shards
from calm_pl.data.shard_writer import write_shards
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.run.folder import RunFolder
from calm_pl.training.extraction import HeadExtraction, StoreWriter
from calm_pl.training.module import CalmModule
from calm_pl.training.trainer import CalmTrainer
from tests.conftest import tone
from tests.extracting import QUIET, in_two_ranks
from tests.families import FAMILIES

CUT = ("qwen2-audio", "granite-speech", "glm-asr")
NOT_CUT = {"whisper": "tp_plan|no way to cut", "gemma-4-unified": "2 processes: take a number"}


def heads_and_words(lalm: FrozenLALM, clips: list[Clip]) -> dict[str, torch.Tensor]:
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    words = {} if lalm.model.config.is_encoder_decoder else {"words": label_log_likelihoods(lalm, inputs, ["a", "b c"])}
    return {"heads": lalm.head_outputs(clips), **words}


def read_by_both(models: Path, clips: list[Clip]) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for name in CUT:
        lalm = FrozenLALM.from_pretrained(models / name, heads=FAMILIES[name].heads, tensor_parallel=True)
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in lalm.model.get_decoder().parameters()]
        held = {"held": torch.tensor(sum(weight.numel() for weight in weights))}
        save_file({**heads_and_words(lalm, clips), **held}, models / f"{name}.{rank}.safetensors")
    told = []
    for name in NOT_CUT:
        with pytest.raises(BackboneError) as error:
            FrozenLALM.from_pretrained(models / name, tensor_parallel=True)
        told.append(str(error.value))
    (models / f"told.{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> tuple[Path, list[Clip]]:
    """What two processes read together, by family and rank."""
    models, sounds = (tmp_path_factory.mktemp(name) for name in ("models", "sounds"))
    for name in (*CUT, *NOT_CUT):
        (models / name).mkdir()
        FAMILIES[name].write(models / name)
    clips = [Clip(str(tone(sounds / f"{n}.wav", 300 * n, 0.4 * n)), question="Why? " * n) for n in (1, 2, 3)]
    in_two_ranks(read_by_both, models, clips)
    return models, clips


@pytest.mark.parametrize("name", CUT)
def test_heads_and_likelihoods_are_those_of_a_whole_model(read, name):
    models, clips = read
    lalm = FrozenLALM.from_pretrained(models / name, heads=FAMILIES[name].heads)
    whole, (first, second) = heads_and_words(lalm, clips), (load_file(models / f"{name}.{r}.safetensors") for r in "01")
    held = [float(one.pop("held")) for one in (first, second)]
    size = sum(weight.numel() for weight in lalm.model.get_decoder().parameters())
    assert held[0] == held[1] < 0.9 * size  # without what is not cut: embeddings and norms
    for found in (first, second):
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=0)


def test_what_cannot_be_cut_is_refused_with_the_way_out(read):
    models, _ = read
    for rank in "01":
        told = json.loads((models / f"told.{rank}.json").read_text())
        for text, (name, why) in zip(told, NOT_CUT.items(), strict=True):
            assert name in text and re.search(why, text)


def test_one_process_has_the_model_whole(tiny_lalm, tones):
    clips = read_manifest(tones)[:2]
    alone = FrozenLALM.from_pretrained(tiny_lalm, tensor_parallel=True).head_outputs(clips)
    assert torch.equal(alone, FrozenLALM.from_pretrained(tiny_lalm).head_outputs(clips))
    backbone = Backbone(tiny_lalm, tensor_parallel=True)
    assert backbone.store_key() == Backbone(tiny_lalm).store_key()
    assert HeadExtraction(backbone).keeps and not HeadExtraction(backbone).together


def test_options_that_do_not_go_together_are_named(tiny_lalm):
    with pytest.raises(BackboneError, match="together with device_map: leave one out"):
        FrozenLALM.from_pretrained(tiny_lalm, tensor_parallel=True, device_map="auto")


def run(files: Path, shards: Path, model: str, folder: Path, together: bool, **devices: object) -> None:
    """Fit and test on files, extract them to another store, and test on shards without one."""
    backbone = Backbone(model, tensor_parallel=together)
    kept, told = [], io.StringIO()
    write = StoreWriter.write_on_batch_end

    def counting(self, trainer, module, prediction, *rest):
        kept.append(prediction is not None)
        write(self, trainer, module, prediction, *rest)

    def go(recipe: Recipe, name: str, store: str, *verbs: str) -> None:
        options = {"shots": None, "batch_size": "auto", "num_workers": 0, "store_dtype": "float32"}
        data = AudioEpisodeDataModule(recipe, backbone, store=store, **options)
        module = CalmModule({"sav": SAV(), "calm": Calm()}, "calm")
        callbacks = [RunFolder()] if "extract" not in verbs else []
        trainer = CalmTrainer(**QUIET, **{"devices": 1, **devices}, default_root_dir=folder / name, callbacks=callbacks)
        if "fit" in verbs:
            trainer.fit(module, datamodule=data)
            trainer.save_checkpoint(folder / "last.ckpt")
        if "extract" in verbs:
            trainer.extract(module, data)
        else:
            trainer.test(module, datamodule=data, ckpt_path=folder / "last.ckpt", verbose=False)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        patch.setattr(StoreWriter, "write_on_batch_end", counting)
        go(Folder(str(files)), "files", str(folder / "fitted"), "fit", "test")
        go(Folder(str(files)), "extracted", str(folder / "extracted"), "extract")
        go(Shards(str(shards)), "stream", "none", "test")
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    found = {"ran": len(kept), "kept": sum(kept), "told": told.getvalue()}
    (folder / f"found.{rank}.json").write_text(json.dumps(found))


def run_in_two_ranks(*arguments: object) -> None:
    run(*arguments, devices=2, strategy="ddp")


@pytest.mark.parametrize("together", [True, False], ids=["one model", "a model each"])
def test_a_run_on_two_processes_keeps_every_clip_once(together, tones, tiny_lalm, tmp_path):
    pytest.importorskip("webdataset")
    files, shards = tmp_path / "files", tmp_path / "tar"
    clips = [clip for clip in read_manifest(tones) if clip.split == "test"]
    write_shards(clips, shards, per_shard=5)
    files.symlink_to(tones)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run(files, shards, tiny_lalm, tmp_path / "one", together=False)
    in_two_ranks(run_in_two_ranks, files, shards, tiny_lalm, tmp_path / "two", together)

    alone, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one/found.0.json", "two/found.0.json", "two/found.1.json")
    )
    assert "21 of 21 clips are in" in first["told"] and alone["ran"] == alone["kept"] > 4
    assert ("with tensor_parallel, auto finds none" in first["told"]) == together
    if together:  # both ran all batches, and the first kept them
        assert "21 clips, " in first["told"] and "on the first of" not in first["told"]
        assert (first["kept"], second["ran"], second["kept"]) == (alone["kept"], alone["ran"], 0)
    else:
        assert first["ran"] + second["ran"] == first["kept"] + second["kept"] == alone["ran"]
        assert second["ran"] >= alone["ran"] // 3
    key = Backbone(tiny_lalm).store_key()
    keys = HeadStore(key, tmp_path / "one" / "fitted").clip_keys(read_manifest(tones))
    whole_NKD, *others = (
        HeadStore(key, tmp_path / store, dtype="float32").read(keys)
        for store in ("one/fitted", "two/fitted", "two/extracted")
    )
    for heads_NKD in others:
        torch.testing.assert_close(heads_NKD, whole_NKD, atol=2e-4, rtol=0)
    for name in ("files", "stream"):
        one, two = (json.loads((tmp_path / n / name / "results.json").read_text()) for n in ("one", "two"))
        assert one["splits"] == two["splits"] and one["methods"].keys() == two["methods"].keys()
        for method, figures in one["methods"].items():
            assert figures["accuracy"] == two["methods"][method]["accuracy"]
            assert figures["nll"] == pytest.approx(two["methods"][method]["nll"], abs=1e-3)


def fit_with_a_device_map(files: Path, model: str, folder: Path) -> None:
    data = AudioEpisodeDataModule(
        Folder(str(files)), Backbone(model, device_map="auto"), shots=2, num_workers=0, store=str(folder / "heads")
    )
    trainer = CalmTrainer(**QUIET, devices=2, strategy="ddp", default_root_dir=folder)
    with pytest.raises(BackboneError, match="device_map=auto .* 2 run here: .* tensor_parallel in place of device_map"):
        trainer.fit(CalmModule({"sav": SAV()}, "sav"), datamodule=data)


def test_a_device_map_is_refused_to_several_processes_of_a_fit_too(tones, tiny_lalm, tmp_path):
    in_two_ranks(fit_with_a_device_map, tones, tiny_lalm, tmp_path)
