"""What a prompt holds of one clip: its sound, its pictures, or both, the way each family takes them.

Shapes: S samples, F frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from torch import Tensor

from calm_pl.audio import audio_seconds, load_audio
from calm_pl.backbone.errors import BackboneError
from calm_pl.clip import Clip

Modality = Literal["audio", "video", "audiovisual"]


class Media(NamedTuple):
    """What is decoded of one clip, or of a piece of a long one."""

    waveform_S: Tensor  # float32, mono, at the model's rate; empty where nothing is heard
    frames_F3HW: Tensor | None = None  # uint8, RGB; None where nothing is seen


class Content:
    """How one checkpoint takes clips of one modality.

    Qwen-Omni processors take videos, and interleave them with their sound. Others that see (Gemma, Phi-4) take the
    frames as images, before the sound.

    Args:
        processor: the checkpoint's own.
        modality: ``audio``, ``video`` or ``audiovisual``.
        frame_rate: frames a second.

    Raises:
        BackboneError: the modality is unknown, the rate is not above 0, or the model does not see, or not by this
            version of transformers.
    """

    def __init__(self, processor: Any, modality: Modality = "audio", frame_rate: float = 2.0) -> None:
        if modality not in get_args(Modality):
            raise BackboneError(f"modality={modality!r} is unknown: choose one of {', '.join(get_args(Modality))}.")
        if frame_rate <= 0:
            raise BackboneError(f"frame_rate={frame_rate:g}: more than 0 frames a second.")
        self.hears = modality != "video"
        self.sees = modality != "audio"
        self.frame_rate = frame_rate
        self.takes_videos = hasattr(processor, "load_audio_from_video")
        if self.takes_videos:  # as Qwen's own code does; transformers asks for a choice
            processor.video_processor.cap_pixels_per_frame = True
        self.audio_token: str = getattr(processor, "audio_token", "")
        self.frame_token: str = getattr(processor, "video_token" if self.takes_videos else "image_token", "")
        if self.sees and not self.frame_token:
            raise BackboneError(f"{type(processor).__name__} takes no pictures: set modality to audio.")
        if self.sees and not self.takes_videos and type(processor).__name__.startswith("Qwen"):
            raise BackboneError(
                f"modality={modality}: {type(processor).__name__} reads films from transformers 5.23 on, and this is "
                f"{transformers.__version__}: pip install 'calm-pl[video]'"
            )

    def load(self, clip: Clip, sampling_rate: int, max_seconds: float | None, hold_last: bool = False) -> Media:
        """Decode what the modality needs. A clip without a video of its own shows that of its audio file.

        With ``hold_last``, a later piece of a clip whose sound outlasts its pictures shows the last of them.

        Raises:
            AudioError: it cannot be heard, or (``VideoError``) cannot be seen.
        """
        waveform_S, frames_F3HW = torch.empty(0), None
        if self.hears:
            waveform_S = load_audio(clip.audio, sampling_rate, clip.start, clip.end, max_seconds)
        if self.sees:
            from calm_pl.video import load_frames

            frames_F3HW = load_frames(
                clip.video or clip.audio, self.frame_rate, clip.start, clip.end, max_seconds, hold_last
            )
        return Media(waveform_S, frames_F3HW)

    def seconds(self, clip: Clip) -> float:
        """Length of a clip by its header: of its sound where it is heard, else of its pictures.

        Raises:
            AudioError: as :meth:`load`, where the header tells.
        """
        if self.hears:
            return audio_seconds(clip.audio, clip.start, clip.end)
        from calm_pl.video import video_seconds

        return video_seconds(clip.video or clip.audio, clip.start, clip.end)

    @property
    def interleaved(self) -> bool:
        """Whether sound and pictures are one part of the prompt."""
        return self.hears and self.sees and self.takes_videos

    def parts(self, num_frames: int = 1) -> list[dict[str, str]]:
        """What stands before the question, as chat templates want it."""
        pictures = ["video"] if self.takes_videos else ["image"] * num_frames
        kinds = [*(pictures if self.sees else []), *(["audio"] if self.hears and not self.interleaved else [])]
        return [{"type": kind} for kind in kinds]

    def tokens(self, num_frames: int = 1) -> dict[str, int]:
        """How often each placeholder stands in a rendered prompt."""
        kinds = [part["type"] for part in self.parts(num_frames)]
        expected = {self.audio_token: kinds.count("audio"), self.frame_token: len(kinds) - kinds.count("audio")}
        return {token: count for token, count in expected.items() if count}

    def arguments(self, media: Sequence[Media]) -> dict[str, Any]:
        """The processor's arguments for a batch."""
        found: dict[str, Any] = {}
        if self.hears:
            found["audio"] = [medium.waveform_S.numpy() for medium in media]
        frames = [medium.frames_F3HW for medium in media if medium.frames_F3HW is not None]
        if self.sees and self.takes_videos:
            found |= {"videos": frames, "videos_kwargs": {"do_sample_frames": False, "fps": self.frame_rate}}
        elif self.sees:
            found["images"] = [list(frames_F3HW) for frames_F3HW in frames]
        if self.interleaved:
            found |= {"load_audio_from_video": True, "audio_from_video_indices": list(range(len(media)))}
        return found

    def model_inputs(self) -> dict[str, Tensor]:
        """What the model must be told beyond what its processor makes."""
        return {"use_audio_in_video": torch.tensor([True])} if self.interleaved else {}
