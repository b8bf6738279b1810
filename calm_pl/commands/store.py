"""`calm store`: what the head store holds, whether it is sound, and making room."""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calm_pl.headstore.inventory import StoreInfo

DAY_SECONDS = 24 * 3600
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(argv: list[str]) -> int:
    """Run `calm store <argv>`. Exit status 1: corrupt shards were found, or deleting was not agreed to or failed."""
    arguments = _parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm store", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{ls,verify,prune}")
    for name, run, text in (
        ("ls", _ls, "list the stores, the one used last first"),
        (
            "verify",
            _verify,
            "verify every checksum; corrupt shards are set aside and their clips computed again",
        ),
        (
            "prune",
            _prune,
            "tidy all stores (merge small files, delete corrupt ones); with options, delete stores",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text, aliases=["list"] if name == "ls" else [])
        command.add_argument("--root", help="folder of all stores (default: CALM_STORE, else the user's cache)")
        command.set_defaults(run=run)
    command.add_argument("--older-than", type=_days, metavar="DAYS", help="delete stores not used for so long")
    command.add_argument("--max-size", type=_bytes, metavar="SIZE", help="delete the least recently used until 10G")
    command.add_argument(
        "--key", type=_prefix, metavar="PREFIX", help="delete stores whose folder's name begins like this"
    )
    command.add_argument("--yes", action="store_true", help="delete without asking")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 10G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _days(text: str) -> float:
    days = float(text)
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of days")
    return days


def _prefix(text: str) -> str:
    if not text:  # of a shell variable that is not set, say: every name begins like this
        raise argparse.ArgumentTypeError("it is empty; calm store ls shows the stores' names")
    return text


def _size(count: float) -> str:
    for unit in "BKMG":
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} T"


def _show(stores: list[StoreInfo]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("store", "backbone", "dtype", "clips", "files", "size", "last use", box=None)
    for info in stores:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.last_use))
        dtype, clips = (info.store.dtype, f"{info.clips:,}") if info.store is not None else ("-", "unreadable")
        table.add_row(info.folder.name[:12], info.backbone, dtype, clips, f"{info.files:,}", _size(info.size), used)
    Console().print(table)


def _ls(arguments: argparse.Namespace) -> int:
    from calm_pl.headstore import store_root
    from calm_pl.headstore.inventory import list_stores

    stores = list_stores(arguments.root)
    if stores:
        _show(stores)
    print(f"{len(stores)} stores, {_size(sum(info.size for info in stores))} in {store_root(arguments.root)}")
    for info in stores:
        if info.problem:
            print(info.problem)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from calm_pl.headstore import store_root
    from calm_pl.headstore.inventory import list_stores

    unsound = 0
    stores = list_stores(arguments.root)
    if not stores:
        print(f"there are no stores in {store_root(arguments.root)}")
    for info in stores:
        corrupt = info.store.verify() if info.store is not None else 1
        clips = len(info.store) if info.store is not None else 0
        print(f"{info.folder.name}: {clips:,} clips sound, {corrupt} corrupt files {info.problem}".rstrip())
        unsound += corrupt
    return 1 if unsound else 0


def _prune(arguments: argparse.Namespace) -> int:
    from rich.prompt import Confirm

    from calm_pl.headstore import HeadStoreError
    from calm_pl.headstore.inventory import delete, least_recently_used, list_stores, tidy

    stores = list_stores(arguments.root)
    if arguments.key is not None and not any(info.folder.name.startswith(arguments.key) for info in stores):
        print(f"no store's name begins with {arguments.key}; calm store ls shows them", file=sys.stderr)
        return 1
    doomed = least_recently_used(stores, arguments.max_size) if arguments.max_size is not None else []
    for info in stores:
        old = arguments.older_than is not None and time.time() - info.last_use > arguments.older_than * DAY_SECONDS
        named = arguments.key is not None and info.folder.name.startswith(arguments.key)
        if (old or named) and info not in doomed:
            doomed.append(info)
    if doomed:
        _show(doomed)
        try:
            if not arguments.yes and not Confirm.ask(f"Delete {len(doomed)} stores?", default=False):
                return 1
        except EOFError:
            print("\ncalm: nobody answers here; --yes deletes without asking", file=sys.stderr)
            return 1
    problems = []
    for info in stores:
        try:
            (delete if info in doomed else tidy)(info)
        except (HeadStoreError, OSError) as error:
            problems.append((info, error))
    left = sum(info in doomed for info, _ in problems)
    print(f"{len(doomed) - left} stores deleted, {len(stores) - len(doomed) - len(problems) + left} tidied")
    for info, problem in problems:
        print(f"{info.folder.name}: {problem}")
    return 1 if problems else 0
