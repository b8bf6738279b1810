"""What hearing, seeing, and both together tell: `python -m examples.audiovisual [FOLDER]`.

Makes short films of four classes, two colours times two pitches, so that sound alone and pictures alone can each tell
half of what there is to tell. A small Qwen2.5-Omni with random weights, made on the spot, is fitted and tested in the
three modalities on the same support set. It has learned nothing, and its heads still carry what it is shown.
Takes a minute on one core. Needs the extras `video` and `families`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import av
import lightning as L
import numpy as np
from rich.console import Console
from rich.table import Table

from calm_pl import AudioEpisodeDataModule, Backbone, CalmModule
from calm_pl.baselines import SAV
from calm_pl.data.recipes import Folder
from calm_pl.methods.calm import Calm
from tests.families import FAMILIES

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}
PITCHES = {"low": 200.0, "high": 1500.0}
MODALITIES = ("audio", "video", "audiovisual")
SHOTS, TEST_FILMS = 4, 8
FILM_RATE, SOUND_RATE, SIDE = 10, 16_000, 56


def write_film(path: Path, frames_FHW3: np.ndarray, wave_S: np.ndarray | None) -> Path:
    """A film of uint8 RGB frames at 10 a second and, unless None, a sound of 16 kHz.

    The codecs follow from the ending: H.264 and AAC in mp4, VP8 and Opus in webm.
    """
    webm = path.suffix == ".webm"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        # Without loss, for what x264 throws away is not the same at every run.
        lossless = {} if webm else {"crf": "0"}
        pictures = film.add_stream("libvpx" if webm else "libx264", rate=FILM_RATE, options=lossless)
        pictures.height, pictures.width = frames_FHW3.shape[1:3]
        pictures.pix_fmt = "yuv420p"
        if wave_S is not None:
            sound = film.add_stream("libopus" if webm else "aac", rate=SOUND_RATE, layout="mono")
        for pixels_HW3 in frames_FHW3:
            film.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels_HW3, format="rgb24")))
        film.mux(pictures.encode())
        if wave_S is not None:
            samples = av.AudioFrame.from_ndarray(wave_S[None].astype(np.float32), format="fltp", layout="mono")
            samples.sample_rate = SOUND_RATE
            film.mux(sound.encode(samples))
            film.mux(sound.encode())
    return path


def colour_and_pitch(colour: str, pitch: str, seed: int, seconds: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy frames of one colour, and a noisy tone."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, 25, (round(seconds * FILM_RATE), SIDE, SIDE, 3))
    frames_FHW3 = np.clip(noise + COLOURS[colour], 0, 255).astype(np.uint8)
    time_S = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    hertz = PITCHES[pitch] * random.uniform(0.9, 1.1)
    return frames_FHW3, 0.4 * np.sin(2 * np.pi * hertz * time_S) + random.normal(0, 0.05, len(time_S))


def make_films(folder: Path) -> Path:
    """A folder data set of the four classes, with its split."""
    seed = 0
    for split, count in (("train", SHOTS), ("test", TEST_FILMS)):
        for colour in COLOURS:
            for pitch in PITCHES:
                for number in range(count):
                    seed += 1
                    path = folder / split / f"{colour}, {pitch}" / f"{number}.mp4"
                    write_film(path, *colour_and_pitch(colour, pitch, seed))
    return folder


def figures(films: Path, model: Path, modality: str, scratch: Path) -> dict[str, dict[str, Any]]:
    """Every method's figures on the test films, by Lightning's fit and test."""
    backbone = Backbone(str(model), modality=modality)
    data = AudioEpisodeDataModule(
        Folder(str(films)), backbone, shots=SHOTS, num_workers=0, store=str(scratch / "heads")
    )
    methods = {"sav": SAV(), "calm": Calm(), "calm_whitened": Calm(metric="whitened")}
    module = CalmModule(methods, zero_shot=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=scratch,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module.figures


def run(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Films and model into `folder`, then the figures of each modality."""
    films = make_films(folder / "films")
    FAMILIES["qwen2.5-omni"].write(folder / "omni")
    return {modality: figures(films, folder / "omni", modality, folder) for modality in MODALITIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="keep films and model here; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments.folder or Path(scratch))
    table = Table("method", *MODALITIES, title=f"accuracy in %, {SHOTS} films a class, four classes")
    for method in results["audio"]:
        table.add_row(method, *(f"{100 * results[modality][method]['accuracy']:.1f}" for modality in MODALITIES))
    Console().print(table)


if __name__ == "__main__":
    main()
