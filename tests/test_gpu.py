"""What only a GPU can show: half precision in hardware, the batch size that fits, several devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from calm_pl import CalmModule
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.precision import arithmetic
from calm_pl.backbone.spec import Backbone
from calm_pl.baselines import GRW, SAV, KNearest, LinearProbe, MeanOfHeads, NearestPrototype
from calm_pl.clip import Clip
from calm_pl.data.manifest import read_manifest
from calm_pl.data.stream import BatchSize
from calm_pl.headstore import HeadStore
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import Whitened
from calm_pl.training.extraction import HeadExtraction, extract_missing
from tests.conftest import tone
from tests.extracting import QUIET
from tests.test_module import data_module
from tests.test_wrong_weights import lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
ACCELERATOR = "gpu"
DEVICE = "cuda"


def extracted(
    folder: Path,
    model: str,
    root: Path,
    precision: str = "32-true",
    batch_size: BatchSize = 2,
    num_workers: int = 0,
    **options: Any,
) -> torch.Tensor:
    """Head outputs (N, K, D) that one device puts into a store."""
    clips, backbone = read_manifest(folder), Backbone(model, **options)
    trainer = L.Trainer(**{**QUIET, "accelerator": ACCELERATOR, "devices": 1, "precision": precision})
    store = HeadStore(backbone.store_key(arithmetic(precision)), root, dtype="float32")
    extraction = HeadExtraction(backbone)
    assert not extract_missing(trainer, clips, extraction, store, batch_size, num_workers)
    assert extraction.lalm.device.type == DEVICE
    return store.read(store.clip_keys(clips))


def on_gpus(devices: int, command: str, folder: Path, model: str, *more: str) -> None:
    """Run a command of ``calm`` on so many GPUs, a process each."""
    data = ["--data", "folder", "--data.recipe.init_args.data_dir", str(folder), "--backbone", model]
    trainer = ["--trainer.accelerator", ACCELERATOR, "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
    subprocess.run([sys.executable, "-m", "calm_pl", command, *data, *trainer, *more], check=True)


@pytest.fixture(scope="module")
def on_cpu(tones, tiny_lalm) -> torch.Tensor:
    return FrozenLALM.from_pretrained(tiny_lalm).head_outputs(read_manifest(tones))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("heads", ["decoder", "both"])
def test_heads_are_those_of_the_cpu(tones, tiny_lalm, tmp_path, heads, num_workers):
    found_NKD = extracted(tones, tiny_lalm, tmp_path, num_workers=num_workers, heads=heads)
    expected_NKD = FrozenLALM.from_pretrained(tiny_lalm, heads=heads).head_outputs(read_manifest(tones))
    torch.testing.assert_close(found_NKD, expected_NKD, atol=1e-3, rtol=0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "16-mixed"])
def test_half_precision_turns_heads_little(tones, tiny_lalm, tmp_path, on_cpu, precision):
    heads_NKD = extracted(tones, tiny_lalm, tmp_path, precision)
    assert torch.cosine_similarity(heads_NKD, on_cpu, dim=-1).median() > 0.999


def test_auto_finds_a_batch_size_and_changes_nothing(tones, tiny_lalm, tmp_path, on_cpu, capfd):
    heads_NKD = extracted(tones, tiny_lalm, tmp_path, batch_size="auto")
    torch.testing.assert_close(heads_NKD, on_cpu, atol=1e-3, rtol=0)
    assert "batch size: " in capfd.readouterr().err


def test_a_batch_that_does_not_fit_is_run_in_halves(tiny_lalm, tmp_path):
    clip = Clip(str(tone(tmp_path / "long.wav", 700, 5)))
    lalm = FrozenLALM.from_pretrained(tiny_lalm, device=DEVICE)
    inputs = lalm.processor([clip] * 512, [lalm.processor.load(clip)] * 512)
    lalm.head_outputs([clip])  # what libraries take at their first call they keep
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_reserved()
    whole_NKD = lalm.forward(inputs).cpu()
    needed = torch.cuda.max_memory_reserved() - held
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + needed // 3
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(UserWarning, match="out of memory with a batch of 512 clips"):
            halves_NKD = HeadExtraction(Backbone(tiny_lalm), lalm).read(inputs).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(halves_NKD, whole_NKD, atol=1e-3, rtol=0)


# As in test_backbone_options: the shipped model is small, and rounding tells in it.
@pytest.mark.parametrize(("quantization", "cosine"), [("4bit", 0.6), ("8bit", 0.95)])
def test_weights_of_few_bits_hear(tones, tmp_path, quantization, cosine):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    heads_NKD = extracted(tones, "calm-tiny", tmp_path, "bf16-true", quantization=quantization)
    few, half = (
        FrozenLALM.from_pretrained("calm-tiny", "bfloat16", DEVICE, quantization=q) for q in (quantization, None)
    )
    assert few.model.get_memory_footprint() < 0.9 * half.model.get_memory_footprint()
    expected_NKD = FrozenLALM.from_pretrained("calm-tiny").head_outputs(read_manifest(tones))
    assert torch.cosine_similarity(heads_NKD, expected_NKD, dim=-1).median() > cosine


def test_layers_spread_by_themselves_are_heard_as_on_the_cpu(tones, tiny_lalm, tmp_path, on_cpu):
    pytest.importorskip("accelerate")
    found_NKD = extracted(tones, tiny_lalm, tmp_path, device_map="auto")
    torch.testing.assert_close(found_NKD, on_cpu, atol=1e-3, rtol=0)


def test_an_adapter_is_heard_as_on_the_cpu(tones, tiny_lalm, tmp_path, on_cpu):
    adapter = str(lora(tiny_lalm, tmp_path / "lora"))
    found_NKD = extracted(tones, tiny_lalm, tmp_path, adapter=adapter)
    adapted = FrozenLALM.from_pretrained(tiny_lalm, adapter=adapter)
    torch.testing.assert_close(found_NKD, adapted.head_outputs(read_manifest(tones)), atol=1e-3, rtol=1e-3)
    assert (found_NKD - on_cpu).abs().max() > 0.1


def test_every_method_finds_what_it_finds_on_the_cpu(tones, tiny_lalm, tmp_path):
    """On the same heads, from one store; learned weights under EarlyStopping's criterion. In mixed precision on heads
    of their own, from which learning goes on in float32."""
    figures = {}
    for name, accelerator, precision in (
        ("cpu", "cpu", "32-true"),
        ("gpu", ACCELERATOR, "32-true"),
        ("mixed", ACCELERATOR, "bf16-mixed"),
    ):
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
    assert figures["mixed"] == pytest.approx(figures["cpu"], rel=0.25, abs=0.05)


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
    """To the last bit with a model each, and up to rounding with one model cut over both."""
    heads = []
    for devices, together in ((1, "false"), (2, "false"), (2, "true")):
        root = tmp_path / f"{devices}-{together}"
        options = ("--data.batch_size", "2", "--data.backbone.tensor_parallel", together)
        on_gpus(devices, "extract", tones, tiny_lalm, "--data.store", str(root), *options)
        (folder,) = (path.parent for path in root.glob("*/key.json"))
        store = HeadStore.open(folder)
        heads.append(store.read(store.clip_keys(read_manifest(tones))))
    assert torch.equal(heads[0], heads[1])
    torch.testing.assert_close(heads[0], heads[2], atol=5e-3, rtol=2e-3)  # kept as float16
