"""`calm backbones`: which audio-language models there are, and whether the one at hand will work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def main(argv: list[str]) -> int:
    """Run `calm backbones <argv>`. Exit status 1: the checkpoint cannot serve as a backbone."""
    arguments = _parser().parse_args(argv)
    if arguments.command:
        return _inspect(arguments.path, arguments.revision, arguments.trust_remote_code)
    return _list()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm backbones", description=__doc__, epilog="Without a command: the list.")
    commands = parser.add_subparsers(dest="command", metavar="inspect")
    text = "read a checkpoint's config, without its weights, and say whether and how it will work"
    inspect = commands.add_parser("inspect", help=text, description=text)
    inspect.add_argument("path", metavar="PATH", help="a name of the list, a folder, or a hub id")
    inspect.add_argument("--revision", help="branch, tag or commit on the hub")
    inspect.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with it")
    return parser


def _list() -> int:
    from rich.console import Console

    from calm_pl.backbone.catalogue import CATALOGUE, FAMILIES

    columns = ["name", "hub id", "layers x\nheads x dim", "Hz", "longest\nclip", "bf16", "4-bit", "tested"]
    rows = []
    for name, known in CATALOGUE.items():
        longest = "any" if known.max_seconds is None else f"{known.max_seconds} s"
        shape = f"{known.layers} x {known.heads} x {known.head_dim}"
        about = "" if known.exact else "~"
        memory = [about + _gigabytes(known.bf16_gb), about + _gigabytes(known.four_bit_gb)]
        rows.append([name, known.hub_id, shape, str(known.sampling_rate), longest, *memory, known.tested])
    console = Console()
    whole = _table(columns, rows)
    needed = console.measure(whole, options=console.options.update_width(1000)).maximum
    if not console.is_terminal:  # a model is a line, for grep
        console.width = max(console.width, needed)
    if console.width >= needed:
        console.print(whole)
    else:
        console.print(_table(columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]))
        console.print(_table(columns[:2], [row[:2] for row in rows]))
    console.print(_table(["tested family", "for example"], [list(family) for family in FAMILIES.items()]))
    console.print("Will another checkpoint work, and if not, why? calm backbones inspect PATH", style="dim")
    return 0


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose cells are never cut nor broken over lines: they are there to be copied."""
    from rich.table import Table

    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*row)
    table.add_row()
    return table


def _gigabytes(size: float) -> str:
    return f"{size:.1f} GB" if size >= 0.1 else f"{1000 * size:.0f} MB"


def _inspect(path: str, revision: str | None, trust_remote_code: bool) -> int:
    from calm_pl.backbone.errors import BackboneError, HubUnreachable
    from calm_pl.backbone.inspection import inspect_checkpoint
    from calm_pl.backbone.named import named_backbone

    backbone = named_backbone(path)
    try:
        found = inspect_checkpoint(
            backbone.path, revision or backbone.revision, trust_remote_code or backbone.trust_remote_code
        )
    except BackboneError as error:
        verdict = "cannot tell" if isinstance(error, HubUnreachable) else "does not work"
        print(f"{verdict}: {error}", file=sys.stderr)
        return 1
    longest = "any length" if found.max_seconds is None else f"{found.max_seconds:g} s"
    rows = {
        "works": f"yes, as {found.model}",
        "decoder": found.decoder,
        "encoder": found.encoder,
        "audio": f"{found.sampling_rate} Hz, longest clip {longest}",
        "memory": f"{_gigabytes(found.bf16_gb)} in bf16, {_gigabytes(found.four_bit_gb)} in 4 bits (weights alone)",
        "prompt": found.prompt,
    }
    for name, value in rows.items():
        print(f"{name:8} {value!r}" if name == "prompt" else f"{name:8} {value}")
    return 0
