"""A checkpoint of a published size, from disk to head outputs: `python -m benchmarks.large`.

Writes a checkpoint of random weights in bfloat16 (17 GB), and has a process of its own load it and read heads of
generated clips: seconds until the first batch is done, clips per second from then on, and the peak of that process's
memory, or of the GPU's. On CPU the weights are mapped into memory and come from the disk with the first batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, write_checkpoint
from benchmarks.vote import RESULTS


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load the checkpoint and read heads, in this process."""
    from benchmarks.extraction import machine, make_clips, peak_mib
    from calm_pl.backbone.spec import Backbone

    started = time.perf_counter()
    lalm = Backbone(str(folder)).load("bfloat16", options.device)
    clips = make_clips(folder, options.batch_size + options.clips, options.seconds)
    lalm.head_outputs(clips[: options.batch_size], batch_size=options.batch_size)
    warm = time.perf_counter()
    heads_NKD = lalm.head_outputs(clips[options.batch_size :], batch_size=options.batch_size)
    ended = time.perf_counter()
    assert bool(heads_NKD.isfinite().all())
    return {
        "machine": machine(lalm.device),
        "checkpoint_gb": sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9,
        "heads": heads_NKD.shape[1],
        "head_dim": heads_NKD.shape[2],
        "first_batch_seconds": warm - started,
        "clips_per_second": options.clips / (ended - warm),
        "peak_gib": peak_mib(lalm.device) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen2-audio-7b", "qwen2.5-omni-7b"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--scratch", help="folder for the checkpoint, one at a time; default: the system's")
    parser.add_argument("--name", default="large", help="results/<name>.json")
    parser.add_argument("--one", type=Path, help="read the checkpoint in this folder and print its figures")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    results = {}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            print(f"{shape}: writing a checkpoint of random weights")
            write_checkpoint(SHAPES[shape], Path(folder))
            command = [sys.executable, "-m", "benchmarks.large", *sys.argv[1:], "--one", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shape} ended with status {done.returncode} (-9: out of memory)")
        results[shape] = found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{shape}: {found['checkpoint_gb']:.1f} GB, {found['heads']} heads of {found['head_dim']};"
            f" first batch after {found['first_batch_seconds']:.0f} s, then {found['clips_per_second']:.2f} clips/s,"
            f" peak {found['peak_gib']:.1f} GiB"
        )
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.name}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
