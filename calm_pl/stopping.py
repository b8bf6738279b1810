"""How a command is stopped: by Ctrl-C, by a SIGTERM, by the end of another process. Imports nothing heavy."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SECONDS_TO_INTERRUPT_AGAIN = 0.1
SECONDS_FOR_THE_FIRST_RANK = 3.0
SECONDS_WITHOUT_THE_FIRST_RANK = 10.0
SECONDS_UNHEARD = 10.0
SECONDS_BETWEEN_LOOKS = 0.05
STOPPED = "calm: stopped; the same command goes on where it was"

_tells: int | None = None  # the end of a pipe into which each signal is written the moment it comes


class Terminated(KeyboardInterrupt):
    """A SIGTERM, as of `kill` or `timeout`, which ends a command as Ctrl-C does."""


def stopped(stop: KeyboardInterrupt) -> int:
    """Say so; return the exit code."""
    status = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return status  # torchrun stops them all
        # Once this rank has ended, Lightning kills the first one. That one shall stop by itself, which ends this one,
        # too; where it waits for others and does not hear, this one speaks for it.
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    print(STOPPED, file=sys.stderr, flush=True)
    return status


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, a Ctrl-C that Python would drop, since it fell into a finaliser or a fork, comes once more; a
    SIGTERM is heard; and either ends a process that waits for others where Python hears nothing."""
    before = sys.unraisablehook

    def hook(dropped: UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            # Later: raised in here it would be dropped again.
            threading.Timer(SECONDS_TO_INTERRUPT_AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        with _heard() if threading.current_thread() is threading.main_thread() else nullcontext():
            yield
    finally:
        sys.unraisablehook = before


class _Seen:
    """Whether a handler has run. No threading.Event, in which a handler that another signal interrupts would hang."""

    by_a_handler = False


@contextmanager
def _heard() -> Iterator[None]:
    """Handle the signals that stop a command, as far as nobody else does or wants them ignored."""
    seen = _Seen()

    def interrupt(number: int, frame: object) -> None:
        seen.by_a_handler = True
        raise KeyboardInterrupt

    def terminate(number: int, frame: object) -> None:
        seen.by_a_handler = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough; a second would break into the tidying up
        raise Terminated

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    # Lightning takes note of a SIGTERM, and an extraction would go on to its end. SLURM's it means to outlast.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and "SLURM_JOB_ID" not in os.environ:
        handlers[signal.SIGTERM] = terminate
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    # A further rank ends with the first one, see `outlive_nobody`.
    watches = bool(handlers) and os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with _watch(frozenset(handlers), seen) if watches else nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watch(numbers: frozenset[signal.Signals], seen: _Seen) -> Iterator[None]:
    """Within the block, end this process some seconds after a signal that its handler has not run for: Python calls
    handlers between two steps of the main thread, and there is none while torch waits for other processes.
    """
    global _tells
    read_end, _tells = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(_tells, False)
    before = signal.set_wakeup_fd(_tells, warn_on_full_buffer=False)
    threading.Thread(target=_end_if_unheard, args=(read_end, numbers, seen), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(_tells)
        _tells = None


def _leave_to_the_parent() -> None:
    if _tells is not None:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_the_parent)  # a fork's own signals are none of its parent's


def _end_if_unheard(read_end: int, numbers: frozenset[signal.Signals], seen: _Seen) -> None:
    with open(read_end, "rb", buffering=0) as told:
        while select.select([told], [], []) and (came := told.read()):
            stops = [number for number in came if number in numbers]
            if not stops:
                continue
            end = time.monotonic() + SECONDS_UNHEARD
            while not seen.by_a_handler:
                if time.monotonic() > end:
                    print(STOPPED, file=sys.stderr, flush=True)
                    os._exit(128 + stops[-1])
                time.sleep(SECONDS_BETWEEN_LOOKS)
            seen.by_a_handler = False
            told.read()  # those that came until now were handled with it


def outlive_nobody(parent: int) -> None:
    """End a further rank whose first one is gone: killed while ranks look for each other, it would be waited for by the
    others for as long as they may wait for one that reads heads, a day."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(SECONDS_WITHOUT_THE_FIRST_RANK)  # enough to end by itself
    os._exit(1)
