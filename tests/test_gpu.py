"""What only a GPU can show: half precision in hardware, the batch size that fits, several devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from calm_pl import CalmModule
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import GRW, SAV, KNearest, LinearProbe, MeanOfHeads, NearestPrototype
from calm_pl.data.manifest import read_manifest
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import Whitened
from calm_pl.training.extraction import BatchSize, HeadExtraction, arithmetic, extract_missing
from tests.extracting import QUIET
from tests.test_module import data_module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
ACCELERATOR = "gpu"


def extracted(
    folder: Path, model: str, root: Path, precision: str = "32-true", batch_size: BatchSize = 2
) -> torch.Tensor:
    """Head outputs (N, K, D) that one device puts into a store."""
    clips, backbone = read_manifest(folder), Backbone(model)
    trainer = L.Trainer(**{**QUIET, "accelerator": ACCELERATOR, "devices": 1, "precision": precision})
    store = HeadStore(backbone.store_key(arithmetic(precision)), root, dtype="float32")
    assert not extract_missing(trainer, clips, HeadExtraction(backbone), store, batch_size)
    return store.read(store.clip_keys(clips))


def on_gpus(devices: int, command: str, folder: Path, model: str, *more: str) -> None:
    """Run a command of ``calm`` on so many GPUs, a process each."""
    data = ["--data", "folder", "--data.recipe.init_args.data_dir", str(folder), "--backbone", model]
    trainer = ["--trainer.accelerator", ACCELERATOR, "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
    subprocess.run([sys.executable, "-m", "calm_pl", command, *data, *trainer, *more], check=True)


@pytest.fixture(scope="module")
def on_cpu(tones, tiny_lalm) -> torch.Tensor:
    return FrozenLALM.from_pretrained(tiny_lalm).head_outputs(read_manifest(tones))


def test_heads_are_those_of_the_cpu(tones, tiny_lalm, tmp_path, on_cpu):
    torch.testing.assert_close(extracted(tones, tiny_lalm, tmp_path), on_cpu, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "16-mixed"])
def test_half_precision_turns_heads_little(tones, tiny_lalm, tmp_path, on_cpu, precision):
    heads_NKD = extracted(tones, tiny_lalm, tmp_path, precision)
    assert torch.cosine_similarity(heads_NKD, on_cpu, dim=-1).median() > 0.999


def test_auto_finds_a_batch_size_and_changes_nothing(tones, tiny_lalm, tmp_path, on_cpu, capfd):
    heads_NKD = extracted(tones, tiny_lalm, tmp_path, batch_size="auto")
    torch.testing.assert_close(heads_NKD, on_cpu, atol=1e-3, rtol=0)
    assert "batch size: " in capfd.readouterr().err


def test_weights_of_8_bits_hear(tones, tiny_lalm):
    pytest.importorskip("bitsandbytes")
    heads_NKD = Backbone(tiny_lalm, quantization="8bit").load("bfloat16", "cuda").head_outputs(read_manifest(tones))
    assert heads_NKD.isfinite().all() and not torch.equal(heads_NKD[0], heads_NKD[-1])


def test_every_method_finds_what_it_finds_on_the_cpu(tones, tiny_lalm, tmp_path):
    """On the same heads, from one store; learned weights under EarlyStopping's criterion, in mixed precision too."""
    figures = {}
    for name, accelerator, precision in (("cpu", "cpu", "32-true"), ("gpu", ACCELERATOR, "32-true")):
        learned = LearnedWeights(steps=15, shrinkage=0.3, tau=0.15, to_start=0.1, to_shared=0.1, shots=2)
        formulas = {"calm": Calm(), "calm_whitened": Calm("whitened"), "whitened_probe": Whitened(LinearProbe())}
        baselines = [SAV(), GRW(), LinearProbe(), KNearest(), NearestPrototype(), MeanOfHeads()]
        methods = {**formulas, **{type(one).__name__: one for one in baselines}, "calm_learned": learned}
        model = CalmModule(methods, classifier="calm_learned", zero_shot=False)
        data = data_module(tones, tiny_lalm, store=str(tmp_path))
        stop = EarlyStopping("support/calm_learned/nll", patience=5, check_on_train_epoch_end=True)
        run = L.Trainer(**{**QUIET, "accelerator": accelerator, "devices": 1, "precision": precision}, callbacks=[stop])
        run.fit(model, datamodule=data)
        run.test(model, datamodule=data, verbose=False)
        figures[name] = {method: found["nll"] for method, found in model.figures.items()}
        assert run.global_step == 15
        figures[name]["moved"] = float(learned.get_parameter("moves_KC").abs().sum())
    assert figures["gpu"] == pytest.approx(figures["cpu"], rel=1e-2, abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_learn_what_one_learns(tones, tiny_lalm, tmp_path):
    found = []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        store = ("--data.store", str(tmp_path / "heads"), "--data.shots", "2", "--run_dir", str(run))
        on_gpus(devices, "fit", tones, tiny_lalm, *store)
        found.append(json.loads((run / "results.json").read_text())["methods"])
    for method, figures in found[0].items():
        assert found[1][method]["accuracy"] == figures["accuracy"], method


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_fill_the_store_that_one_fills(tones, tiny_lalm, tmp_path):
    stores = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        on_gpus(devices, "extract", tones, tiny_lalm, "--data.store", str(root), "--data.batch_size", "2")
        (folder,) = (path.parent for path in root.glob("*/key.json"))
        stores.append(HeadStore.open(folder))
    keys = stores[0].clip_keys(read_manifest(tones))
    assert torch.equal(stores[0].read(keys), stores[1].read(keys))
