"""Commands that are stopped: by Ctrl-C, by a SIGTERM, one process or two; nothing goes on, and it is said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_run import calm_process, options

# A shell's background jobs ignore Ctrl-C, and with them the tests that one runs.
INTERRUPTIBLE = """
import signal, sys
from calm_pl import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_so(tones, tiny_lalm, tmp_path, stop):
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", "--data.store", tmp_path / "heads")
    command = [sys.executable, "-c", INTERRUPTIBLE, "fit", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as fit:
        assert fit.stderr is not None
        said = ""
        for line in fit.stderr:
            if not said:
                fit.send_signal(stop)
            said += line
    assert fit.returncode == 128 + stop and "calm: stopped" in said and "Traceback" not in said, said


def test_a_further_rank_does_not_outlive_the_first(tmp_path):
    """Killed while the others look for it, it cannot tell them."""
    rank = """
import time
from pathlib import Path
from calm_pl import cli, stopping
stopping.SECONDS_WITHOUT_THE_FIRST_RANK = 0.5
cli._run = lambda argv: (Path("started").touch(), time.sleep(20), Path("outlived").touch())
cli.main(["fit"])
"""
    first = """
import os, signal, subprocess, sys, time
from pathlib import Path
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "LOCAL_RANK": "1"})
while not Path("started").exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Until both have ended: both hold the pipe.
    ended = subprocess.run(
        [sys.executable, "-c", first, rank],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "started").exists() and not (tmp_path / "outlived").exists()


def of_group(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry.name)) == group and (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes as Linux shows them")
def test_two_processes_stop_together_and_say_so(tones, tiny_lalm, tmp_path):
    """While the second one starts, the first waits for it in torch, where no Ctrl-C is heard."""
    two_processes = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    arguments = options(tones, tiny_lalm, "--run_dir", tmp_path / "run", *two_processes)
    command = [sys.executable, "-m", "calm_pl", "fit", *map(str, arguments)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also below a shell whose jobs ignore it
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard
    ) as fit:  # fmt: skip
        while fit.poll() is None and len(of_group(fit.pid)) < 2:
            time.sleep(0.1)
        time.sleep(3)
        os.killpg(fit.pid, signal.SIGINT)
        _, said = fit.communicate(timeout=100)
    assert fit.returncode in (130, -signal.SIGKILL) and "calm: stopped" in said, said
    assert not of_group(fit.pid)


# As a first rank does whose others were never started, on another node.
WAITS_FOR_OTHERS = """
import signal, sys, types
from datetime import timedelta
from calm_pl import cli, stopping
signal.signal(signal.SIGINT, signal.default_int_handler)
stopping.SECONDS_UNHEARD = 0.5

def main(argv):
    from torch.distributed import TCPStore

    print("waiting", file=sys.stderr, flush=True)
    TCPStore("localhost", 0, world_size=2, is_master=True, timeout=timedelta(seconds=60))

sys.modules["slow"] = types.SimpleNamespace(main=main)
cli.COMMANDS["slow"] = ("slow", "")
sys.exit(cli.main(["slow"]))
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_is_stopped(stop):
    with subprocess.Popen([sys.executable, "-c", WAITS_FOR_OTHERS], stderr=subprocess.PIPE, text=True) as slow:
        assert slow.stderr is not None and slow.stderr.readline() == "waiting\n"
        time.sleep(0.3)  # it is in there soon
        slow.send_signal(stop)
        _, said = slow.communicate(timeout=30)
    assert slow.returncode == 128 + stop and said == "calm: stopped; the same command goes on where it was\n"


# A fork's signals are told to the parent by the pipe that it inherits, were they not kept apart.
FORKS = """
import os, signal, sys, time, types
from calm_pl import cli, stopping
stopping.SECONDS_UNHEARD = 0.5

def main(argv):
    if not (child := os.fork()):
        time.sleep(60)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    time.sleep(1.5)
    return 0

sys.modules["forks"] = types.SimpleNamespace(main=main)
cli.COMMANDS["forks"] = ("forks", "")
sys.exit(cli.main(["forks"]))
"""


def test_a_signal_to_a_worker_does_not_stop_the_command():
    assert calm_process(program=FORKS).returncode == 0


# A garbage collection takes long enough in a fit for many a Ctrl-C to be handled in a finaliser, where Python drops it.
INTERRUPTED_IN_A_FINALISER = """
import signal, sys, time, types
from calm_pl import cli
signal.signal(signal.SIGINT, signal.default_int_handler)

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main(argv):
    Finalised()
    time.sleep(60)

sys.modules["slow"] = types.SimpleNamespace(main=main)
cli.COMMANDS["slow"] = ("slow", "")
sys.exit(cli.main(["slow"]))
"""


def test_an_interruption_in_a_finaliser_is_not_lost():
    slow = calm_process(program=INTERRUPTED_IN_A_FINALISER)
    assert slow.returncode == 130 and slow.stderr == "calm: stopped; the same command goes on where it was\n"
