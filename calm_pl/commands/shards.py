"""`calm shards`: tar shards (WebDataset) of a data set too large for single files."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Run `calm shards <argv>`. Exit status 1: clips were left out."""
    arguments = _parser().parse_args(argv)
    from calm_pl.data.manifest import ManifestError, read_manifest
    from calm_pl.data.shard_writer import write_shards

    try:
        clips = [clip for clip in read_manifest(arguments.manifest) if arguments.split in (None, clip.split)]
        if not clips:
            raise ValueError(f"{arguments.manifest}: no clip is of split {arguments.split}")
        shards, errors = write_shards(clips, arguments.out, arguments.per_shard)
    except (ManifestError, FileExistsError, ValueError) as error:
        _parser().error(str(error))
    for unusable in errors:
        print(f"left out: {unusable}")
    last = shards[-1].stem.removeprefix("clips-")
    print(f"{len(clips) - len(errors):,} clips in {arguments.out}/clips-{{000000..{last}}}.tar, {len(errors)} left out")
    return 1 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calm shards", description=__doc__)
    make = parser.add_subparsers(required=True, metavar="make").add_parser(
        "make", help="write shards from a manifest", description="Write shards from a manifest."
    )
    make.add_argument("manifest", help="a .jsonl, .json or .csv file, or a folder of classes")
    make.add_argument(
        "out", help="folder to write to, without tar files; but the same command goes on where it stopped"
    )
    make.add_argument("--per-shard", type=_positive, default=1000, metavar="N", help="clips a shard (default: 1000)")
    make.add_argument("--split", choices=("train", "val", "test"), help="only the clips of this split (default: all)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)
