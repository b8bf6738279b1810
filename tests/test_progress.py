"""What long work shows of itself: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_pl import progress
from calm_pl.clip import Clip
from calm_pl.data.stream import ClipBatch
from calm_pl.progress import Task, duration, quiet, say, track
from calm_pl.training import progress as extraction_progress
from calm_pl.training.progress import ExtractionProgress
from tests.test_run import calm, calm_process, options

PHASES = ["reading heads: 15 clips", "fitting on the support set: 6 methods", "learning weights", "testing: 9 clips"]
FAST = ["--model.methods.calm_learned.init_args.steps", "2"]


def test_in_a_log_there_are_plain_lines_with_the_time_left(capfd, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(track("ab", "reading", 2, "clips")) == ["a", "b"]
    with Task("walking") as task:
        task.advance(3, "uphill")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "reading: 2 clips",
        "reading: 1 of 2 clips, 0:00 left", "reading: 2 of 2 clips, 0:00 left",
        "reading: 2 clips in 0:00",
        "walking", "walking: 3, uphill", "walking: 3 in 0:00",
    ]  # fmt: skip


def test_short_work_takes_one_line(capfd):
    list(track(range(1000), "counting", 1000))
    assert capfd.readouterr().err == "counting: 1,000\n"


def test_quiet_says_nothing_and_ends(capfd):
    with quiet():
        say("hello")
        list(track("ab", "reading", 2))
    assert capfd.readouterr().err == ""
    say("hello again")
    assert capfd.readouterr().err == "hello again\n"


def test_time_left_is_at_the_speed_so_far(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    task = Task("reading", 100, shown=False)
    assert task.time_left() == ""
    now = 30.0
    task.advance(20)
    assert task.time_left() == "2:00 left"


@given(st.integers(0, 400_000))
def test_durations_read_back(seconds):
    parts = [int(part) for part in duration(seconds).split(":")]
    assert sum(part * 60**power for power, part in enumerate(reversed(parts))) == seconds
    assert all(part < 60 for part in parts[1:])


def in_a_terminal(**env: str) -> str:
    """What a terminal receives from a task of three steps."""
    program = "from calm_pl.progress import track\nfor _ in track('abc', 'reading', 3, 'clips'): pass"
    terminal, end = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", progress.QUIET)}
    subprocess.run([sys.executable, "-c", program], stderr=end, env={**environment, "TERM": "xterm", **env}, check=True)
    os.close(end)
    try:
        return os.read(terminal, 1 << 16).decode()
    except OSError:  # nothing was written
        return ""
    finally:
        os.close(terminal)


def test_a_terminal_has_a_bar_unless_it_is_of_ci_or_quiet():
    assert "\x1b[" in (shown := in_a_terminal()) and "3/3" in shown
    assert in_a_terminal(CI="true").split() == ["reading:", "3", "clips"]
    assert in_a_terminal(CALM_QUIET="1") == ""


class Moment:
    """What a GPU tells of a moment in its work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Moment) -> float:
        return 1000 * (later.seconds - self.seconds)


def test_a_gpu_that_computes_does_not_wait(monkeypatch):
    """Batches take it 3 seconds; the second is there after 1 second, the third a second after the GPU did that."""
    told = iter(map(Moment, (10.0, 13.0, 13.0, 16.0, 17.0, 20.0)))
    monkeypatch.setattr(extraction_progress, "mark", lambda device: next(told))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    model: Any = None
    shown = ExtractionProgress(enabled=False)
    shown.setup(trainer, model, "predict")
    shown.on_predict_start(trainer, model)
    for _ in range(3):
        shown.on_predict_batch_start(trainer)
        shown.on_predict_batch_end(trainer, model, None, ClipBatch([Clip("a.wav")] * 5, [None] * 5, None, []))
    shown.on_predict_end(trainer, model)
    assert shown.waited_share == pytest.approx(1 / 10) and shown.clips_per_second == pytest.approx(15 / 10)


def test_a_run_says_what_it_does_and_where_results_lie(tones, tiny_lalm, tmp_path):
    fit = calm_process("fit", *options(tones, tiny_lalm, "--run_dir", tmp_path, *FAST), CALM_STORE=str(tmp_path / "s"))
    said = fit.stderr
    at = [said.find(phase) for phase in [*PHASES, "asking in words: 9 clips", "writing the report"]]
    assert -1 not in at and at == sorted(at), said
    assert "\x1b" not in said and "\r" not in said
    assert "6 labelled clips of 3 classes to learn from, 9 to test on" in said
    assert fit.stdout.rstrip().endswith(f"run folder: {tmp_path}")


def test_quiet_commands_show_results_alone(tones, tiny_lalm, tmp_path, capfd):
    data = options(tones, tiny_lalm)
    out = ["--out", tmp_path / "out"]
    once = ["--shots", "1", "--seeds", "1", *data[:6], "--data.num_workers", "0"]
    calm("fit", *data, "--run_dir", tmp_path / "run", *FAST, "--quiet")
    calm("--quiet", "test", "--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt")
    calm("compare", *out, "--quiet", *once, "--model", "baselines")
    calm("extract", *data, "--quiet")
    shown, said = capfd.readouterr()
    assert shown.count("run folder:") == 2 and "points above" in shown and "are in" in shown
    for phase in ("reading", "fitting", "learning", "testing", "asking", "loading", "writing"):
        assert phase not in said, said
