"""The ``calm`` command: which commands there are, and where each one lives. Imports nothing heavy."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from calm_pl.progress import quiet
from calm_pl.stopping import interruptible, outlive_nobody, stopped

# command -> (module with main(argv) -> int, what it does)
COMMANDS = {
    "fit": (
        "calm_pl.commands.lightning",
        "learn which heads each class may trust, then test; leaves a run folder",
    ),
    "test": ("calm_pl.commands.lightning", "test a run again, from its checkpoint"),
    "validate": ("calm_pl.commands.lightning", "as test, on the validation split"),
    "predict": (
        "calm_pl.commands.lightning",
        "classify the test clips of a data set; writes predictions.csv",
    ),
    "classify": ("calm_pl.commands.classify", "classify audio files with the classifier of a run"),
    "sweep": ("calm_pl.commands.sweep", "run every point of a sweep file, and compare them"),
    "report": ("calm_pl.commands.report", "remake a run's report, or compare runs"),
    "heads": ("calm_pl.commands.heads", "measure whether a run's classes rely on different heads"),
    "extract": ("calm_pl.commands.lightning", "read the heads of a data set into the head store"),
    "compare": ("calm_pl.commands.compare", "compare methods over shots, seeds and folds"),
    "episodes": ("calm_pl.commands.episodes", "N-way K-shot accuracy over many random episodes"),
    "suggest": ("calm_pl.commands.suggest", "name the unlabelled clips most worth labelling"),
    "pseudolabel": ("calm_pl.commands.pseudolabel", "let the backbone label clips that nobody has labelled"),
    "store": ("calm_pl.commands.store", "list, verify or prune the head store"),
    "backbones": ("calm_pl.commands.backbones", "list audio-language models, or inspect a checkpoint"),
    "datasets": ("calm_pl.commands.datasets", "list data sets, or check one on disk"),
    "shards": ("calm_pl.commands.shards", "write WebDataset shards from a manifest"),
}


def main(argv: list[str] | None = None) -> int:
    """Run ``calm``; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--quiet" in argv:
        with quiet():
            return main([argument for argument in argv if argument != "--quiet"])
    if not argv or argv[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    if argv[0] == "--version":
        from calm_pl import __version__

        print(f"calm-pl {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        _parser().error(f"unknown command {argv[0]!r}; choose one of: {', '.join(COMMANDS)}")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # As stderr's: what an encoding such as ASCII lacks must not end a finished run.
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=outlive_nobody, args=(os.getppid(),), daemon=True).start()
    try:
        with interruptible():
            return _run(argv)
    except KeyboardInterrupt as stop:
        return stopped(stop)
    except SystemExit as end:  # Lightning's own, when a fit or an extraction is interrupted
        if isinstance(end.__context__, KeyboardInterrupt):
            return stopped(end.__context__)
        raise
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if os.environ.get("CALM_DEBUG"):
            raise
        print(f"calm: error: {error}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    # Python's last collections would walk all that torch and transformers have made: a second or two for nothing.
    atexit.register(gc.freeze)
    module, _ = COMMANDS[argv[0]]
    # Lightning's commands share one module, which wants to know which of them it is.
    arguments = argv if module == "calm_pl.commands.lightning" else argv[1:]
    with _plain_warnings():
        exit_code: int = import_module(module).main(arguments)
    sys.stdout.flush()
    return exit_code


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within the block, what this package warns of is told without the line of code that it comes from."""
    before = warnings.formatwarning
    package = os.path.dirname(__file__) + os.sep

    def told(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and filename.startswith(package):
            return f"calm: warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = told
    try:
        yield
    finally:
        warnings.formatwarning = before


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    return argparse.ArgumentParser(
        prog="calm",
        usage="calm COMMAND [options] [--quiet]",
        description="Few-shot audio classification with the attention heads of a frozen audio-language model.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items())
        + "\n\n--quiet, with any command: results and errors alone. In a log or in CI, progress is told in plain lines."
        "\n`calm COMMAND --help` tells a command's options. A first run: calm fit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
