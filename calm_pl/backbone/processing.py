"""Clips and sound in, the model's own inputs out. Holds no weights and can be sent to worker processes.

Shapes: B clips, R rows of features, T tokens, S samples.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, PreTrainedConfig

from calm_pl.audio import AudioError
from calm_pl.backbone import mistral
from calm_pl.backbone.config import untrusted
from calm_pl.backbone.content import Content, Media, Modality
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.window import alone_from, can_be_cut, mixes_from, shorter_features
from calm_pl.clip import DEFAULT_PROMPT, DEFAULT_QUESTION, Clip

PaddingSide = Literal["left", "right"]
LongClips = Literal["cut", "split"]
# Below this length a processor may give a clip no audio token at all, which transformers does not notice.
SURELY_LONG_ENOUGH_SECONDS = 0.5
# Shorter clips get silence behind them first: some processors raise an error of their own at less.
SHORTEST_SECONDS = 0.05
# A clip that is longer than the window by less than this loses nothing worth a warning.
UNHEARD_SECONDS = 0.1
# What `warn_of_cut` says behind its numbers, for those who filter that warning.
CUT_WARNING = ".* longer than the model's window"
EXTRACTORS = ("feature_extractor", "audio_processor")
# Which mel frames carry sound, by the names that processors give it.
FRAME_MASKS = ("feature_attention_mask", "input_features_mask", "audio_attention_mask")
# Seconds, by which a model counts positions: never rounded to its precision.
EXACT = ("video_second_per_grid",)
# What becomes codes of a codebook, in parts of the model that stay in float32 (Apertus): rounded it gives other codes.
CODED = ("input_values", "pixel_values")


@dataclass
class LALMInputs:
    """One batch, ready for the model, with what the hooks need to know about it.

    Attributes:
        model_inputs: the model's own arguments; empty where the batch is in ``parts``.
        last_token_B: index of each clip's last prompt token.
        frames_R: mel frames that carry sound in each row of features, of ``max_frames``.
        windows_B: rows of features of each clip, of which a processor makes several where one window does not hold it.
        audio_token_id: the token that stands for sound; None in an encoder-decoder model and where nothing is heard.
        parts: batches to be run one after another instead of this one. Row i of them is, or is a piece of, this
            batch's clip ``order[i]``.
        exact: model inputs that are never rounded to the model's precision.
    """

    model_inputs: dict[str, Tensor]
    last_token_B: Tensor
    frames_R: Tensor | None = None
    windows_B: Tensor | None = None
    max_frames: int | None = None
    audio_token_id: int | None = None
    parts: tuple[LALMInputs, ...] = ()
    order: tuple[int, ...] = ()
    exact: tuple[str, ...] = EXACT

    @property
    def audio_BT(self) -> Tensor | None:
        """Which tokens stand for sound; None where none do."""
        return None if self.audio_token_id is None else self.model_inputs["input_ids"] == self.audio_token_id

    @property
    def clip_R(self) -> Tensor:
        """The clip that each row of features is of."""
        clip_B = torch.arange(len(self.last_token_B), device=self.last_token_B.device)
        if self.windows_B is None:
            return clip_B
        rows = None if self.frames_R is None else len(self.frames_R)  # else a GPU is asked how many, and waited for
        return clip_B.repeat_interleave(self.windows_B, output_size=rows)

    @cached_property
    def packed_lengths(self) -> tuple[list[int], list[int]]:
        """Positions of each clip where an encoder packs the batch: one per audio token, or one per two mel frames
        before a last pooling. Counted once a batch: to ask a GPU is to wait for it."""
        assert self.audio_BT is not None and self.frames_R is not None
        return self.audio_BT.sum(1).tolist(), ((self.frames_R + 1) // 2).tolist()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LALMInputs:
        """Move to ``device``, all at once: a copy in a hook would have a GPU wait in every layer. Floating-point inputs
        are cast to the model's ``dtype``."""

        def move(name: str, x: Tensor) -> Tensor:
            x = x.to(device, non_blocking=True)  # first: a copy that casts does so on the CPU, out of unpinned memory
            return x.to(dtype) if x.is_floating_point() and name not in self.exact else x

        return self._map(move)

    def pin_memory(self) -> LALMInputs:
        """Called by DataLoader, so that the copy to a GPU overlaps with computing."""
        return self._map(lambda name, x: x.pin_memory())

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> LALMInputs:
        found = {name: getattr(self, name) for name in ("last_token_B", "frames_R", "windows_B")}
        changed: dict[str, Any] = {name: change(name, x) for name, x in found.items() if x is not None}
        model_inputs = {name: change(name, x) for name, x in self.model_inputs.items()}
        parts = tuple(part._map(change) for part in self.parts)
        return replace(self, model_inputs=model_inputs, parts=parts, **changed)

    def in_parts(self, run: Callable[[LALMInputs], Tensor]) -> Tensor:
        """Run every part; return the mean over the rows of each clip, in the order of this batch (B, ...)."""
        rows = torch.cat([run(part) for part in self.parts])
        clip = torch.tensor(self.order)
        counts = clip.bincount().view(-1, *[1] * (rows.ndim - 1)).to(rows.device)
        sums = rows.new_zeros(len(self.last_token_B), *rows.shape[1:]).index_add(0, clip.to(rows.device), rows)
        return sums / counts


class ClipProcessor:
    """Turns clips into inputs by the checkpoint's own processor and chat template.

    Args:
        checkpoint: folder of the checkpoint.
        config: of the checkpoint.
        prompt: the text after the audio; ``{question}`` stands for the clip's question.
        padding_side: where shorter prompts of a batch are padded; the head outputs do not depend on it.
        cut_window: compute features for the longest clip of a batch instead of the full window, where the encoder
            allows it; several times faster for short clips, equal up to rounding.
        long_clips: ``cut`` clips at the model's window, or ``split`` them evenly and average the pieces.
        modality: what is taken of a clip: ``audio``, ``video`` or ``audiovisual``.
        frame_rate: frames a second of a video.

    Raises:
        BackboneError: when the checkpoint has no processor that takes audio, or no pictures where they are wanted.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: PreTrainedConfig,
        prompt: str = DEFAULT_PROMPT,
        padding_side: PaddingSide = "left",
        trust_remote_code: bool = False,
        cut_window: bool = True,
        long_clips: LongClips = "cut",
        modality: Modality = "audio",
        frame_rate: float = 2.0,
    ) -> None:
        if long_clips not in get_args(LongClips):
            raise BackboneError(f"long_clips={long_clips!r} is unknown: choose cut or split.")
        try:
            self.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            if not trust_remote_code and "trust_remote_code" in str(error):
                raise untrusted(checkpoint) from error
            raise BackboneError(f"{checkpoint} has no processor that transformers can load: {error}") from error
        # Granite Speech and Phi-4 call it audio_processor.
        extractor = next((getattr(self.processor, name) for name in EXTRACTORS if hasattr(self.processor, name)), None)
        if extractor is None:
            raise BackboneError(
                f"{checkpoint} takes no audio: its processor {type(self.processor).__name__} has no feature "
                "extractor. Choose an audio-language model."
            )
        self.checkpoint = checkpoint
        self.prompt = prompt
        self.long_clips = long_clips
        self.extractor = extractor
        self.cut_window = cut_window and can_be_cut(config)
        self.sampling_rate: int = extractor.sampling_rate
        self.max_seconds = _longest_clip(self.processor, extractor)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = padding_side
        self.mixes_from, self.alone_from = mixes_from(config, extractor), alone_from(config, extractor)
        self.exact = (*EXACT, *CODED) if hasattr(config, "audio_token_offset") else EXACT
        self.content = Content(self.processor, modality, frame_rate)
        self.audio_token = self.content.audio_token
        self.audio_token_id: int = self.tokenizer.convert_tokens_to_ids(self.audio_token)
        self.template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(self.template, dict):  # one of several, by name
            self.template = self.template.get("default")
        self.mistral = type(self.tokenizer).__name__ == "MistralCommonBackend"
        # An encoder-decoder model (Whisper) is prompted by its fixed start tokens, not by a chat.
        self.start_tokens: list[int] | None = None
        if self.template is None and not self.mistral:
            self.start_tokens = getattr(self.tokenizer, "prefix_tokens", None)
            if self.start_tokens is None:
                raise BackboneError(f"{checkpoint} has no chat template: add its chat_template.jinja to the folder.")

    def load(self, clip: Clip) -> list[Media]:
        """Decode one clip, no further than the window; where long ones are split, its pieces. Raises AudioError."""
        return [
            self.content.load(piece, self.sampling_rate, self.max_seconds, hold_last=number > 0)
            for number, piece in enumerate(self._pieces(clip))
        ]

    def _pieces(self, clip: Clip) -> list[Clip]:
        """The clip, or, where long ones are split, the even stretches of time of which none exceeds the window."""
        if self.max_seconds is None or self.long_clips == "cut":
            return [clip]
        begin, seconds = clip.start or 0.0, self.content.seconds(clip)
        count = math.ceil(seconds / self.max_seconds)
        times = [clip.start, *(begin + seconds * i / count for i in range(1, count)), clip.end]
        return [replace(clip, start=start, end=end) for start, end in pairwise(times)]

    def is_cut(self, clip: Clip) -> bool:
        """Whether a clip is longer than the model's window and is cut there: by its header, nothing is decoded."""
        if self.max_seconds is None or self.long_clips == "split":
            return False
        window = self.max_seconds + UNHEARD_SECONDS
        if clip.end is not None and clip.end - (clip.start or 0.0) <= window:
            return False  # without opening the file
        try:
            return self.content.seconds(clip) > window
        except AudioError:  # told when it is decoded
            return False

    def warn_of_cut_clips(self, clips: Sequence[Clip]) -> list[int]:
        """Warn of clips that are cut; return their positions."""
        cut = [position for position, clip in enumerate(clips) if self.is_cut(clip)]
        self.warn_of_cut(len(cut), len(clips))
        return cut

    def warn_of_cut(self, count: int, total: int) -> None:
        """Warn where so many clips of ``total`` are cut."""
        if count:
            warnings.warn(
                f"{count} of {total} clips are longer than the model's window of {self.max_seconds:g} s: what "
                "comes later is left out. long_clips=split averages over all of it.",
                stacklevel=2,
            )

    def question(self, clip: Clip) -> str:
        """The text after the audio."""
        return self.prompt.replace("{question}", clip.question or DEFAULT_QUESTION)

    def text(self, clip: Clip, num_frames: int = 1) -> str:
        """The full prompt of one clip, through the checkpoint's chat template.

        Raises:
            BackboneError: the template writes no audio, or no pictures where there are.
        """
        question = self.question(clip)
        if self.mistral:
            return mistral.text(self.processor, question)
        # Templates take a list of parts; older ones (Granite Speech) one text with the audio token written into it.
        parts = [*self.content.parts(num_frames), {"type": "text", "text": question}]
        tokens = self.content.tokens(num_frames)
        refusals = []
        for content in (parts, "".join(token * count for token, count in tokens.items()) + question):
            turn = {"role": "user", "content": content}
            try:
                rendered: str = self.processor.apply_chat_template(
                    [turn], chat_template=self.template, add_generation_prompt=True, tokenize=False
                )
            except (TypeError, jinja2.TemplateError) as error:  # written for the other form
                refusals.append(f" ({error})")
                continue
            if all(rendered.count(token) == count for token, count in tokens.items()):
                return rendered
        raise BackboneError(
            f"the chat template of {self.checkpoint} writes no {' or no '.join(map(repr, tokens))} for what is heard "
            f"or seen{''.join(dict.fromkeys(refusals))}: replace its chat_template.jinja."
        )

    def __call__(self, clips: Sequence[Clip], media: Sequence[Sequence[Media]]) -> LALMInputs:
        """Batch clips with what was decoded of them (:meth:`load`); every sound yields at least one audio token."""
        order = tuple(i for i, pieces in enumerate(media) for _ in pieces)
        flat = [piece for pieces in media for piece in pieces]
        size = len(clips)
        if len(flat) == size:
            return self._batch(clips, flat)
        chunks = (slice(at, at + size) for at in range(0, len(flat), size))  # no batch is larger than this one
        parts = tuple(self._batch([clips[i] for i in order[chunk]], flat[chunk]) for chunk in chunks)
        return LALMInputs({}, torch.zeros(size, dtype=torch.long), parts=parts, order=order)

    def _batch(self, clips: Sequence[Clip], media: Sequence[Media]) -> LALMInputs:
        """One batch of clips or pieces."""
        if self.start_tokens is not None:
            return self._start_token_inputs([x_S for x_S, _ in media])
        if len(groups := self._groups(media)) > 1:
            return self._apart(clips, media, groups)
        if self.mistral:
            questions = [self.question(clip) for clip in clips]
            return self._inputs(mistral.inputs(self.processor, questions, [x_S for x_S, _ in media]), media)
        texts = [
            self.text(clip, 0 if frames_F3HW is None else len(frames_F3HW))
            for clip, (_, frames_F3HW) in zip(clips, media, strict=True)
        ]
        long_enough = [self._long_enough(medium, text) for medium, text in zip(media, texts, strict=True)]
        return self._inputs(self._process(texts, long_enough), long_enough)

    def _groups(self, media: Sequence[Media]) -> list[list[int]]:
        """Rows that may share a batch: where padding would be heard, those of one length; none where it would fail."""
        groups: dict[tuple[float, int | None], list[int]] = defaultdict(list)
        for row, (x_S, _) in enumerate(media):
            groups[min(len(x_S), self.mixes_from), row if len(x_S) > self.alone_from else None].append(row)
        return list(groups.values())

    def _apart(self, clips: Sequence[Clip], media: Sequence[Media], groups: Sequence[Sequence[int]]) -> LALMInputs:
        """One part for each group of rows."""
        parts = tuple(self._batch([clips[i] for i in group], [media[i] for i in group]) for group in groups)
        order = tuple(i for group in groups for i in group)
        return LALMInputs({}, torch.zeros(len(clips), dtype=torch.long), parts=parts, order=order)

    def _inputs(self, inputs: Mapping[str, Tensor], media: Sequence[Media]) -> LALMInputs:
        mask_BT = inputs["attention_mask"]
        positions_T = torch.arange(mask_BT.shape[1])
        frames_RT = next((inputs[name] for name in FRAME_MASKS if name in inputs), None)
        windows_B = None
        if len(inputs.get("input_features", media)) > len(media):
            window = getattr(self.extractor, "n_samples", math.inf)
            windows_B = torch.tensor([int(-(-len(x_S) // window)) for x_S, _ in media])
        return LALMInputs(
            model_inputs={**inputs, **self.content.model_inputs()},
            last_token_B=(mask_BT * positions_T).argmax(1),
            frames_R=None if frames_RT is None else frames_RT.sum(1),
            windows_B=windows_B,
            max_frames=None if frames_RT is None else frames_RT.shape[1],
            audio_token_id=self.audio_token_id if self.content.hears else None,
            exact=self.exact,
        )

    def _process(self, texts: list[str], media: Sequence[Media]) -> Mapping[str, Tensor]:
        cut = self.cut_window and self.content.hears
        with shorter_features(self.extractor, [x_S for x_S, _ in media]) if cut else nullcontext():
            inputs: Mapping[str, Tensor] = self.processor(
                text=texts,
                sampling_rate=self.sampling_rate,
                return_tensors="pt",
                # Of the text alone: how sound is padded is the processor's own business.
                text_kwargs={"padding": True, "padding_side": self.tokenizer.padding_side},
                **self.content.arguments(media),
            )
        return inputs

    def _long_enough(self, medium: Media, text: str) -> Media:
        """Pad with silence, doubling, until the processor gives the clip an audio token."""
        if not self.content.hears or len(medium.waveform_S) >= SURELY_LONG_ENOUGH_SECONDS * self.sampling_rate:
            return medium
        missing = max(0, round(SHORTEST_SECONDS * self.sampling_rate) - len(medium.waveform_S))
        medium = medium._replace(waveform_S=F.pad(medium.waveform_S, (0, missing)))
        while not (self._process([text], [medium])["input_ids"] == self.audio_token_id).any():
            medium = medium._replace(waveform_S=F.pad(medium.waveform_S, (0, len(medium.waveform_S))))
        return medium

    def _start_token_inputs(self, waveforms: Sequence[Tensor]) -> LALMInputs:
        features = self.extractor(
            [x_S.numpy() for x_S in waveforms],
            sampling_rate=self.sampling_rate,
            return_tensors="pt",
            return_attention_mask=True,
        )
        tokens_BT = torch.tensor([self.start_tokens] * len(waveforms))
        return LALMInputs(
            model_inputs={"input_features": features["input_features"], "decoder_input_ids": tokens_BT},
            last_token_B=torch.full((len(waveforms),), tokens_BT.shape[1] - 1),
            frames_R=features["attention_mask"].sum(1),
            max_frames=features["attention_mask"].shape[1],
        )


def _longest_clip(processor: Any, extractor: Any) -> float | None:
    """Seconds that a processor takes in; None where it takes any length, in one piece or in windows that it makes."""
    if hasattr(processor, "max_audio_len"):  # cut to whole windows
        return float(processor.max_audio_len // extractor.chunk_length * extractor.chunk_length)
    parameters = inspect.signature(extractor.__call__).parameters
    if not _truncates(processor, parameters) or "max_length" not in parameters:
        return None
    # Gemma's extractors cut at this length and do not say so elsewhere.
    samples = parameters["max_length"].default or getattr(extractor, "n_samples", None)
    return samples / extractor.sampling_rate if samples else None


def _truncates(processor: Any, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether the extractor cuts clips, by what the processor asks of it, or its own default."""
    # A processor keeps it in one of two places, by the version of transformers.
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    asked = {**getattr(processor, "audio_kwargs", {}), **defaults.get("audio_kwargs", {})}
    return bool(asked.get("truncation", "truncation" in parameters and parameters["truncation"].default))
