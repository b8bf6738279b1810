"""A data set that fits on no disk: WebDataset tar shards, read as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import DataMissingError


@dataclass
class Shards:
    """Clips of tar shards, for `calm extract`, and for `calm test` and `calm predict` with `--data.store none`.

    Attributes:
        data_dir: a folder of tar files, or an address with braces: `clips-{000..099}.tar`, on `https:`, `s3:`, `gs:`,
            or `pipe:` and a command.
    """

    data_dir: str | None = None

    name: ClassVar[str] = "shards"
    question: ClassVar[str] = "What sound is this?"

    def prepare(self) -> None:
        if not self.urls():
            raise DataMissingError(f"{self.data_dir} holds no tar files; `calm shards make` writes them")

    def urls(self) -> list[str]:
        """The address of every shard.

        Raises:
            DataMissingError: no address is given.
        """
        from calm_pl.data.archives import shard_urls

        if self.data_dir is None:
            raise DataMissingError(
                "shards are yours: name them with --data.recipe.init_args.data_dir (of `make train`: DATA_DIR)"
            )
        return shard_urls(self.data_dir)

    def clips(self) -> list[Clip]:
        """Not known before the shards are read.

        Raises:
            ValueError: always; says what shards are for.
        """
        raise ValueError(
            "shards are a stream, from which no support clips can be drawn: fit on files (folder, manifest), then "
            "test on the shards with --data.store none"
        )
