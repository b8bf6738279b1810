"""Clips per second and peak memory, from audio files to head outputs: `python -m benchmarks.extraction`.

On one model and one set of generated clips, in turns:

    authors_20, authors_1  the published procedure: every clip alone, from its file, 20 times or once; every token of
                           every layer's heads kept, logits computed; the encoder's window never cut
    plain                  the model's own forward pass in batches, inputs ready in memory: the practical limit
    hooked                 the same pass with head hooks
    stopped                the same, ended at the last head that is read (`FrozenLALM.forward`)
    ours                   from the files to the head store, by Trainer.predict with workers
    *_whole_window         plain and ours with the encoder's window never cut
    compiled               stopped, of a model compiled by torch (`--compile`)

Speeds are medians over rounds. On CPU the model gets `--threads` cores, and workers take others where there are any.
There the ratios compare seconds of CPU that the model's process took, which other programs on the machine disturb less
than the clock; what workers take is not in them, and where their cores are missing, `waited for audio` shows it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import soundfile
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SHAPES, random_model
from calm_pl.backbone.hooks import HeadCapture, StopForward, capture_heads
from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.spec import Backbone
from calm_pl.clip import Clip, length_batches
from calm_pl.commands.lightning import hush
from calm_pl.headstore import HeadStore
from calm_pl.training.batch_size import fitting_batch_size, is_out_of_memory
from calm_pl.training.extraction import HeadExtraction, StoreWriter
from calm_pl.training.extraction_data import ClipDataModule
from calm_pl.training.progress import ExtractionProgress

RESULTS = Path(__file__).parent / "results"
FILE_RATE = 44_100  # as most recordings are; resampling is part of the work
PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-true"}
HOOKS_GOAL = 0.98
GOALS = (  # name, numerator, denominator, at least
    ("from files to store", "ours", "plain", 0.90),
    ("published, 20 trials", "ours", "authors_20", 40.0),
    ("published, 1 trial", "ours", "authors_1", 2.5),
    ("window cut", "ours", "ours_whole_window", 1.0),
)


@dataclass
class Figures:
    """What a way to do it costs; memory is what the process grew by, workers not counted."""

    clips_per_second: float
    clips_per_cpu_second: float
    peak_mib: float
    waited_share: float | None = None
    startup_seconds: float | None = None


@dataclass
class Bench:
    """One model, one set of clips."""

    lalm: FrozenLALM
    backbone: Backbone
    clips: list[Clip]
    batch_size: int
    num_workers: int
    _ready: dict[bool, list[LALMInputs]] = field(default_factory=dict, init=False)

    def inputs(self, cut_window: bool = True) -> list[LALMInputs]:
        """The clips in batches on the model's device, made once for all ways."""
        if cut_window not in self._ready:
            self._ready[cut_window] = self._inputs(cut_window)
        return self._ready[cut_window]

    def _inputs(self, cut_window: bool) -> list[LALMInputs]:
        processor = replace(self.backbone, cut_window=cut_window).clip_processor()
        batches = [[self.clips[i] for i in batch] for batch in length_batches(self.clips, self.batch_size)]
        inputs = [processor(batch, [processor.load(clip) for clip in batch]) for batch in batches]
        return [x.to(self.lalm.device, self.lalm.model.dtype) for x in inputs]

    def authors(self, trials: int, clips: int) -> Callable[[], Figures]:
        processor = replace(self.backbone, cut_window=False).clip_processor()

        @torch.inference_mode()
        def one(clip: Clip) -> torch.Tensor:
            inputs = processor([clip], [processor.load(clip)]).to(self.lalm.device, self.lalm.model.dtype)
            kept: dict[str, torch.Tensor] = {}
            hooks = [
                site.projection.register_forward_pre_hook(lambda _, x, name=site.name: kept.update({name: x[0]}))
                for site in self.lalm.sites
            ]
            self.lalm.model(**inputs.model_inputs)
            for hook in hooks:
                hook.remove()
            return torch.cat([x_BTE[:, -1].float().cpu() for x_BTE in kept.values()], dim=-1)

        def run() -> Figures:
            for clip in self.clips[:clips]:
                torch.stack([one(clip) for _ in range(trials)]).mean(0)
            return Figures(clips, clips, 0)

        return lambda: measured(self.lalm.device, run)

    def forward(self, way: str, cut_window: bool = True) -> Callable[[], Figures]:
        ready = self.inputs(cut_window)
        step = self.step(way)

        def run() -> Figures:
            for x in ready:
                step(x)
            return Figures(len(self.clips), len(self.clips), 0)

        return lambda: measured(self.lalm.device, run)

    def step(self, way: str) -> Callable[[LALMInputs], object]:
        """One pass over one batch."""
        only_last = {"logits_to_keep": 1} if takes(self.lalm.model.forward, "logits_to_keep") else {}

        @torch.inference_mode()
        def plain(x: LALMInputs) -> None:
            with self.lalm.window(x):
                self.lalm.model(**x.model_inputs, **only_last, use_cache=False)

        def hooked(x: LALMInputs) -> None:
            with capture_heads(WholePass(self.lalm.sites, x, self.lalm.pooling)):
                plain(x)

        steps: dict[str, Callable[[LALMInputs], object]]
        steps = {"plain": plain, "hooked": hooked, "stopped": self.lalm.forward}
        return steps[way]

    def hooks_cost(self, rounds: int) -> float:
        """Speed with hooks over speed without, batch by batch in turns: a small difference needs neighbours in time."""
        seconds = {"plain": 0.0, "hooked": 0.0}
        ready = self.inputs()
        clock = time.perf_counter if self.lalm.device.type == "cuda" else time.process_time
        for number in range(rounds * len(ready)):
            for way in sorted(seconds, reverse=number % 2 == 0):
                step, started = self.step(way), clock()
                step(ready[number % len(ready)])
                if self.lalm.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[way] += clock() - started
        return seconds["plain"] / seconds["hooked"]

    def ours(self, cut_window: bool = True) -> Callable[[], Figures]:
        backbone = replace(self.backbone, cut_window=cut_window)

        def run() -> Figures:
            with tempfile.TemporaryDirectory() as root:
                store = HeadStore(backbone.store_key(str(self.lalm.model.dtype), root), root)
                progress = ExtractionProgress(enabled=False)
                trainer = L.Trainer(
                    accelerator="gpu" if self.lalm.device.type == "cuda" else "cpu",
                    devices=1,
                    precision=PRECISIONS[self.lalm.model.dtype],
                    callbacks=[StoreWriter(store), progress],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                data = ClipDataModule(self.clips, backbone, store, self.batch_size, self.num_workers)
                trainer.predict(HeadExtraction(backbone, self.lalm), data, return_predictions=False)
                assert not store.missing(data.keys)
                return Figures(len(data.keys), len(data.keys), 0, progress.waited_share, progress.startup_seconds)

        return lambda: measured(self.lalm.device, run)


class WholePass(HeadCapture):
    """Captures the heads without ending the forward pass."""

    def take(self, site: Any, x_BTE: torch.Tensor) -> None:
        try:
            super().take(site, x_BTE)
        except StopForward:
            self.heads_BKD()


def takes(function: Callable[..., object], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def measured(device: torch.device, run: Callable[[], Figures]) -> Figures:
    """Time `run`, which returns numbers of clips in place of speeds; without the time that workers took to start."""
    reset_peak(device)
    before, started, cpu_started = memory_mib(device), time.perf_counter(), time.process_time()
    figures = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started - (figures.startup_seconds or 0)
    cpu_seconds = time.process_time() - cpu_started
    return replace(
        figures,
        clips_per_second=figures.clips_per_second / seconds,
        clips_per_cpu_second=figures.clips_per_cpu_second / cpu_seconds,
        peak_mib=peak_mib(device) - before,
    )


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier ways have freed goes back, so that it is not had for nothing
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts again from what is used now


def memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _status("VmRSS") if sys.platform == "linux" else peak_mib(device)


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def make_clips(folder: Path, count: int, seconds: float) -> list[Clip]:
    """Noise of up to `seconds` seconds, the shortest nine tenths as long."""
    random = np.random.default_rng(0)
    clips = []
    for index in range(count):
        samples = random.normal(0, 0.1, int(seconds * (1 - 0.1 * index / count) * FILE_RATE))
        path = folder / f"{index}.wav"
        soundfile.write(path, samples, FILE_RATE)
        clips.append(Clip(str(path)))
    return clips


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(4):
            x @ y
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started))
    return best


def memory_curve(bench: Bench, flops_rate: float) -> list[dict[str, float]]:
    """Batches of 1, 2, 4, ... clips until memory ends or clips do: speed, memory, share of the matmul rate."""
    curve: list[dict[str, float]] = []
    batch_size = 1
    while batch_size <= len(bench.clips):
        one_batch = replace(bench, clips=bench.clips[:batch_size], batch_size=batch_size)
        try:
            run = one_batch.forward("stopped")
            with FlopCounterMode(display=False) as counter:
                run()
            best = max((run() for _ in range(3)), key=lambda figures: figures.clips_per_second)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"batch of {batch_size:4d}: out of memory")
            break
        share = counter.get_total_flops() / batch_size * best.clips_per_second / flops_rate
        curve.append({"batch_size": batch_size, **figures_of(best), "matmul_share": share})
        speed = f"{best.clips_per_second:8.1f} clips/s, {share:.1%} of the matmul rate"
        print(f"batch of {batch_size:4d}: {speed}, {best.peak_mib:9.0f} MiB")
        batch_size *= 2
    return curve


def figures_of(figures: Figures) -> dict[str, float]:
    return {name: value for name, value in asdict(figures).items() if value is not None}


def median(rounds: Sequence[Figures]) -> Figures:
    columns = {name: [asdict(figures)[name] for figures in rounds] for name in asdict(rounds[0])}
    return Figures(**{name: None if None in values else statistics.median(values) for name, values in columns.items()})


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "lightning": L.__version__}
    return {"device": name, "cores": cores, "load": os.getloadavg()[0], **versions}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="calm-tiny", help="calm-tiny, random-qwen2-audio, a folder or a hub id")
    parser.add_argument("--shape", choices=SHAPES, help="instead: a model of this shape with random weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 on GPU")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="cores of the model, on CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also by torch.compile (not with --shape)")
    parser.add_argument("--curve", action="store_true", help="also speed and memory over batch sizes")
    parser.add_argument("--name", default="extraction", help="results/<name>.json")
    options = parser.parse_args()
    if options.compile and options.shape:
        parser.error("--compile takes a checkpoint (--backbone), no --shape")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def main() -> None:
    options = arguments()
    hush()
    if options.device == "cpu":  # beside a GPU, the published procedure gets all cores for its features
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        clips = make_clips(Path(scratch), options.clips, options.seconds)
        backbone = Backbone(scratch if options.shape else options.backbone)
        if options.shape:
            model = random_model(SHAPES[options.shape], Path(scratch), dtype, options.device)
            lalm = FrozenLALM(model, backbone.clip_processor())
        else:
            lalm = backbone.load(options.dtype, options.device)
        result = measure(Bench(lalm, backbone, clips, options.batch_size, options.workers), options)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    few = max(1, options.clips // 32)
    ways = {
        "authors_20": bench.authors(20, few),
        "authors_1": bench.authors(1, 4 * few),
        "plain": bench.forward("plain"),
        "hooked": bench.forward("hooked"),
        "stopped": bench.forward("stopped"),
        "ours": bench.ours(),
        "plain_whole_window": bench.forward("plain", cut_window=False),
        "ours_whole_window": bench.ours(cut_window=False),
    }
    if options.compile:
        compiled = replace(bench.backbone, compile=True).load(options.dtype, options.device)
        ways["compiled"] = replace(bench, lalm=compiled).forward("stopped")
        ways["compiled"]()  # compiles
    if len(length_batches(bench.clips, bench.batch_size)) < 4 * bench.num_workers:
        print(
            f"few batches for {bench.num_workers} workers: most are decoded before the first one is there, and that "
            "time is not counted in `ours`; give more --clips"
        )
    bench.forward("plain")()  # warms up
    rounds = [{name: way() for name, way in ways.items()} for _ in range(options.rounds)]
    figures = {name: median([one[name] for one in rounds]) for name in ways}
    print(f"{'':20}{'clips/s':>10}{'by CPU time':>13}{'peak MiB':>10}")
    for name, way in figures.items():
        waited = "" if way.waited_share is None else f"   waited for audio {way.waited_share:.0%} of the time"
        print(f"{name:20}{way.clips_per_second:10.2f}{way.clips_per_cpu_second:13.2f}{way.peak_mib:10.0f}{waited}")
    speed = "clips_per_second" if options.device == "cuda" else "clips_per_cpu_second"
    ratios = {"hooks": bench.hooks_cost(options.rounds)}
    print(f"{'hooks':20} hooked / plain, batch by batch = {ratios['hooks']:.3f} (goal {HOOKS_GOAL})")
    for name, above, below, goal in GOALS:
        # Within a round, so that whatever slows the machine down slows both sides.
        ratios[name] = statistics.median(getattr(one[above], speed) / getattr(one[below], speed) for one in rounds)
        print(f"{name:20} {above} / {below} = {ratios[name]:.2f} (goal {goal})")
    device = bench.lalm.device
    auto = None
    if device.type == "cuda":
        auto = fitting_batch_size(bench.lalm.forward, bench.lalm.processor, bench.clips, device)
        print(f"batch_size: auto finds {auto}")
    flops_rate = matmul_flops(device, bench.lalm.model.dtype)
    return {
        "options": vars(options),
        "auto_batch_size": auto,
        "machine": machine(device),
        "ways": {name: figures_of(way) for name, way in figures.items()},
        "ratios": ratios,
        "matmul_tflops": flops_rate / 1e12,
        "curve": memory_curve(bench, flops_rate) if options.curve else [],
    }


if __name__ == "__main__":
    main()
