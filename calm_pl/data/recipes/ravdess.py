"""RAVDESS (Livingstone and Russo, PLOS ONE 2018): acted emotion in speech."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from calm_pl.clip import Clip
from calm_pl.data.recipes.base import DataMissingError, data_root
from calm_pl.data.recipes.download import fetch_archive
from calm_pl.data.splits import split_clips

URL = "https://zenodo.org/records/1188976/files/Audio_Speech_Actors_01-24.zip"
CHECKSUM = "md5:bc696df654c87fed845eb13823edef8a"
SPEECH = "01"  # of the vocal channel; "02" are songs, whose archive has folders of the same names
EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


@dataclass
class Ravdess:
    """1,440 spoken sentences by 24 actors, 8 emotions. There is no official split: actors are drawn for the test.

    Songs that lie in the same folders are left out.

    Attributes:
        data_dir: folder that holds `Actor_01` to `Actor_24`; None is the data cache.
        test_fraction: share of test clips.
        seed: chooses the actors.
    """

    data_dir: str | None = None
    test_fraction: float = 0.3
    seed: int = 0

    name: ClassVar[str] = "ravdess"
    question: ClassVar[str] = "What emotion does the speaker express?"

    def prepare(self) -> None:
        fetch_archive(data_root(self.name, self.data_dir), URL, ["Actor_01"], CHECKSUM)

    def clips(self) -> list[Clip]:
        root = data_root(self.name, self.data_dir)
        clips, songs = [], 0
        for path in sorted(root.glob("Actor_*/*.wav")):
            # modality, channel, emotion, intensity, statement, repetition, actor
            _, channel, emotion, *_, actor = path.stem.split("-")
            if channel == SPEECH:
                clips.append(Clip(str(path), EMOTIONS[int(emotion) - 1], group=actor, question=self.question))
            else:
                songs += 1
        if songs and not clips:
            raise DataMissingError(
                f"{root}: holds {songs} songs of RAVDESS and no speech. Unpack {URL} there (its files have other "
                "names), or give another folder."
            )
        return split_clips(clips, self.test_fraction, self.seed)
