"""What long work shows of itself: a bar in a terminal, plain lines in a log or in CI, nothing when quiet.

All of it goes to standard error; standard output is for results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress
    from typing_extensions import Self

# An environment variable, because further processes of a run (ranks, data workers) must be quiet as well.
QUIET = "CALM_QUIET"
SECONDS_BETWEEN_LINES = 15.0
T = TypeVar("T")


def is_quiet() -> bool:
    return bool(os.environ.get(QUIET))


def is_animated() -> bool:
    """Whether somebody watches: a terminal, and not one of continuous integration."""
    return not is_quiet() and sys.stderr.isatty() and os.environ.get("CI", "").lower() in ("", "0", "false")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing shows progress, in this process and in those that it starts."""
    before = os.environ.get(QUIET)
    os.environ[QUIET] = "1"
    try:
        yield
    finally:
        os.environ.pop(QUIET)
        if before is not None:
            os.environ[QUIET] = before


def say(text: str) -> None:
    """Tell what is done now."""
    if not is_quiet():
        print(text, file=sys.stderr, flush=True)


class Task:
    """Long work under way: how much is done and how much time is left. Ends with its ``with`` block, or `close`.

    Args:
        title: what is done now.
        total: how much there is to do; None where nobody knows.
        unit: of what, in the plural.
        shown: False where another process speaks for all.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "", shown: bool = True) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._started = self._told = time.monotonic()
        self._lines = shown and not is_animated()
        self._bar: Progress | None = None
        if shown and is_animated():
            self._bar = _bar()
            self._row = self._bar.add_task(title, total=total, unit=unit, note="")
            self._bar.start()
        elif self._lines:
            say(title if total is None else f"{title}: {total:,} {unit}".rstrip())

    def advance(self, count: int = 1, note: str = "") -> None:
        """So much more is done; ``note`` is shown beside it."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._row, advance=count, note=note)
        elif self._lines and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            of = "" if self.total is None else f" of {self.total:,}"
            parts = [f"{self.done:,}{of} {self.unit}".rstrip(), note, self.time_left()]
            say(f"{self.title}: {', '.join(filter(None, parts))}")

    def time_left(self) -> str:
        """``0:42 left``, at the speed so far; empty where it cannot be told."""
        if self.total is None or not self.done:
            return ""
        seconds = (time.monotonic() - self._started) / self.done * max(self.total - self.done, 0)
        return f"{duration(seconds)} left"

    def close(self) -> None:
        """Stop showing it; a second call changes nothing."""
        if self._bar is not None:
            self._bar.stop()
        elif self._lines and (seconds := time.monotonic() - self._started) >= SECONDS_BETWEEN_LINES:
            say(f"{self.title}: {f'{self.done:,} {self.unit}'.rstrip()} in {duration(seconds)}")
        self._lines = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[T], title: str, total: int, unit: str = "") -> Iterator[T]:
    """The items, while a `Task` counts them."""
    with Task(title, total, unit) as task:
        for item in items:
            yield item
            task.advance()


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}  {task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
