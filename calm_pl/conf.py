"""Where the shipped configuration files lie, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# A link to the repository's conf/ in a checkout; a folder of its own in a wheel.
CONF_DIR = Path(__file__).parent / "_conf"
# `--data esc50` stands for the shipped file conf/data/esc50.yaml, and so on.
GROUPS = {"--data": "data", "--model": "model", "--trainer": "trainer", "--backbone": "backbone", "--logger": "logger"}


def config_names(group: str) -> list[str]:
    """Names of the files in one folder of ``conf/``, such as ``data`` or ``backbone``."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def given_options(arguments: Sequence[str]) -> dict[str, str]:
    """Options of a command line with what is given for them, in their last place: ``--a b`` or ``--a=b``."""
    options = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        options[option] = value if equals else following
    return options


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested configuration: ``{"a": {"b": 1}}`` gives ``a.b`` and 1."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def find_config(group: str, name: str) -> Path | None:
    """The shipped file ``conf/<group>/<name>.yaml``, or None."""
    file = CONF_DIR / group / f"{name}.yaml"
    return file if file.is_file() else None


def names_help(*options: str) -> dict[str, Any]:
    """Arguments of a parser whose help tells which names the options above take; all of them by default."""
    import argparse

    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    lines = [f"these options take the name of a file in {CONF_DIR}, or a file of your own:"]
    for option in options or GROUPS:
        also = "; or a folder, or a hub id (owner/name)" if option == "--backbone" else ""
        names = ", ".join(config_names(GROUPS[option])) + also
        lines += textwrap.wrap(names, 100, initial_indent=f"  {option:11}", subsequent_indent=" " * 13)
    # Of a hundred options argparse would print a page before every error.
    named = " ".join(f"[{option} NAME]" for option in options or GROUPS)
    usage = f"%(prog)s {named} [options: see --help]"
    return {"epilog": "\n".join(lines), "formatter_class": Formatter, "usage": usage}
