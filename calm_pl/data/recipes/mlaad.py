"""MLAAD (Müller et al., IJCNN 2024): synthetic speech of many generators, beside the recordings of M-AILABS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import data_root, require
from calm_pl.data.recipes.listing import rows
from calm_pl.data.splits import split_clips

STEPS = (
    "MLAAD is at https://deepfake-total.com/mlaad (its folder fake), M-AILABS at "
    "https://github.com/imdatceleste/m-ailabs-dataset (its language folders go into a folder bonafide there)."
)


@dataclass
class Mlaad:
    """Spoofed speech by language and generator, and genuine speech. There is no official split.

    Attributes:
        data_dir: folder that holds `fake/<language>/<generator>/meta.csv` and `bonafide/` (M-AILABS); None is the
            data cache.
        language: one language, such as "en"; None takes all.
        unseen_generators: generators of the test are not in training, and neither are the readers of genuine speech.
            Without it, a sentence and what was synthesised from it share a side.
        test_fraction: share of test clips.
        seed: chooses them.
    """

    data_dir: str | None = None
    language: str | None = None
    unseen_generators: bool = True
    test_fraction: float = 0.3
    seed: int = 0

    name: ClassVar[str] = "mlaad"
    question: ClassVar[str] = "How was this speech produced?"

    def prepare(self) -> None:
        require(data_root(self.name, self.data_dir), ["fake", "bonafide"], STEPS)

    def clips(self) -> list[Clip]:
        return split_clips([*self._spoofed(), *self._genuine()], self.test_fraction, self.seed)

    def attacks(self) -> dict[str, str]:
        """The generator by audio path, of spoofed clips: for a table by generator."""
        return {clip.audio: Path(clip.audio).parent.name for clip in self._spoofed()}

    def _spoofed(self) -> list[Clip]:
        root = data_root(self.name, self.data_dir)
        clips = []
        for meta in sorted((root / "fake").glob(f"{self.language or '*'}/*/meta.csv")):
            for row in rows(meta, delimiter="|"):
                original = PurePosixPath(row["original_file"])
                group = row["model_name"] if self.unseen_generators else original.stem
                path = meta.parent / PurePosixPath(row["path"]).name
                clips.append(Clip(str(path), "spoof", group=group, question=self.question))
        return clips

    def _genuine(self) -> list[Clip]:
        root = data_root(self.name, self.data_dir) / "bonafide"
        # en_UK/by_book/female/elizabeth_klett/jane_eyre/wavs/jane_eyre_01_f000001.wav
        paths = sorted(root.glob(f"{self.language or ''}*/**/wavs/*.wav"))
        return [
            Clip(str(path), "bonafide", group=self._reader(path) if self.unseen_generators else path.stem,
                 question=self.question)
            for path in paths
        ]  # fmt: skip

    @staticmethod
    def _reader(path: Path) -> str:
        return path.parents[2].name
