"""Which backbone and how it is read, without loading it: what configs name and what head stores are keyed by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm_pl.backbone.checkpoints import adapter_folder, resolve_checkpoint
from calm_pl.backbone.pooling import Pooling
from calm_pl.clip import DEFAULT_PROMPT
from calm_pl.headstore import Stamp, file_digest, file_stamp
from calm_pl.progress import is_animated, say

if TYPE_CHECKING:
    from calm_pl.backbone.lalm import FrozenLALM
    from calm_pl.backbone.processing import ClipProcessor

# Raised whenever the code changes what a head output is, so that no stored vector outlives its meaning.
FORMAT_VERSION = 3
# Read by the processor or the model; a readme may change without changing a head output.
FINGERPRINTED = (".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".npz")
# What trainers leave beside a checkpoint, and what people do; nobody reads it.
UNREAD = {
    "all_results.json", "eval_results.json", "predict_results.json", "test_results.json", "train_results.json",
    "trainer_state.json", "LICENSE.txt", "requirements.txt",
}  # fmt: skip
_loaded: dict[object, FrozenLALM] = {}  # the model that was loaded last


@dataclass(frozen=True)
class Backbone:
    """A frozen audio-language model, as a config names it.

    Args:
        path: ``calm-tiny`` (shipped), ``random-qwen2-audio`` (hears nothing), a folder, or a Hugging Face hub id.
        heads: which heads are read: ``decoder``, ``encoder`` or ``both``. Large models know most in the decoder;
            small ones in the encoder.
        prompt: the text after the audio; ``{question}`` stands for the clip's own question.
        revision: branch, tag or commit on the hub.
        layers: decoder layers to read, nothing after the last of them is computed; null reads all.
        cut_window: run the audio encoder on the longest clip of a batch instead of its full window, where it can be.
        attn_implementation: ``eager``, ``sdpa`` or ``flash_attention_2``; null lets transformers choose.
        trust_remote_code: run Python code that comes with the checkpoint. Off unless you trust its author.
        pooling: which prompt tokens a decoder head is read at: ``last``, ``last:N`` (mean of the last N) or ``audio``
            (mean of the tokens that stand for sound).
        long_clips: ``cut`` clips at the model's window, or ``split`` them evenly and average the pieces' heads.
        device_map: ``auto`` spreads the layers over all GPUs of one process; null keeps the model on one.
        tensor_parallel: cut every decoder layer over all processes of the run, so that each GPU holds a part of the
            model; all of them then read every clip together.
        quantization: ``4bit`` or ``8bit`` weights, by bitsandbytes.
        adapter: a LoRA adapter (peft): a folder, a folder inside the checkpoint, or a hub id.
        modality: what is taken of a clip: ``audio``, ``video`` or ``audiovisual``; the last two need a model that sees,
            and PyAV.
        frame_rate: frames a second of a video.
        compile: by ``torch.compile``, which needs a C++ compiler; the first batch takes a minute longer.

    Raises:
        BackboneError: ``pooling`` is unknown.
    """

    path: str = "calm-tiny"
    heads: str = "decoder"
    prompt: str = DEFAULT_PROMPT
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    cut_window: bool = True
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    pooling: str = "last"
    long_clips: str = "cut"
    device_map: str | None = None
    tensor_parallel: bool = False
    quantization: str | None = None
    adapter: str | None = None
    modality: str = "audio"
    frame_rate: float = 2.0
    compile: bool = False

    def __post_init__(self) -> None:
        Pooling.parse(self.pooling)  # here, because nothing else looks at it before the weights are loaded

    @property
    def name(self) -> str:
        """What results are filed under: the shipped name, the hub id, or the folder's name."""
        folder = Path(self.path).expanduser()
        return folder.resolve().name if folder.exists() else self.path

    def load(self, dtype: str = "float32", device: str = "cpu") -> FrozenLALM:
        """Load the weights; see :meth:`FrozenLALM.from_pretrained`.

        A process keeps the model that it loaded last, so that reading heads, asking in words and the runs of a sweep
        share it; it is let go before another one is loaded.
        """
        key = (repr(self), dtype, device, self._state_on_disk())
        if key not in _loaded:
            _loaded.clear()
            _loaded[key] = self._load(dtype, device)
        return _loaded[key]

    def _load(self, dtype: str, device: str) -> FrozenLALM:
        from transformers.utils import logging

        from calm_pl.backbone.lalm import FrozenLALM
        from calm_pl.backbone.tensor_parallel import is_first_process

        if is_first_process():
            say(f"loading {self.name}")
        if not is_animated():
            logging.disable_progress_bar()
        return FrozenLALM.from_pretrained(
            self.path,
            dtype=dtype,
            device=device,
            revision=self.revision,
            prompt=self.prompt,
            heads=self.heads,  # type: ignore[arg-type]  # checked by find_head_sites
            attn_implementation=self.attn_implementation,
            layers=self.layers,
            cut_window=self.cut_window,
            trust_remote_code=self.trust_remote_code,
            pooling=self.pooling,
            long_clips=self.long_clips,  # type: ignore[arg-type]  # checked by ClipProcessor
            device_map=self.device_map,
            tensor_parallel=self.tensor_parallel,
            quantization=self.quantization,  # type: ignore[arg-type]  # checked by placement
            adapter=self.adapter,
            modality=self.modality,  # type: ignore[arg-type]  # checked by Content
            frame_rate=self.frame_rate,
            compile=self.compile,
        )

    def _state_on_disk(self) -> tuple[tuple[str, Stamp | None], ...]:
        """Names and stamps of the files that a loaded model was read from: cheaper than their digests."""
        checkpoint = resolve_checkpoint(self.path, self.revision)
        folders = [checkpoint] if self.adapter is None else [checkpoint, adapter_folder(self.adapter, checkpoint)]
        files = [str(file) for folder in folders for file in _read_files(folder, self.trust_remote_code)]
        return tuple((file, file_stamp(file)) for file in files)

    def clip_processor(self) -> ClipProcessor:
        """The half that workers need: no weights are read.

        Raises:
            BackboneError: as :meth:`load`, where the config or the processor tells.
        """
        from calm_pl.backbone.config import load_config, model_class_of
        from calm_pl.backbone.processing import ClipProcessor

        checkpoint = resolve_checkpoint(self.path, self.revision)
        # Before the processor, whose complaints would hide why the model itself cannot serve.
        config = load_config(checkpoint, self.trust_remote_code, self.path)
        model_class_of(config, self.path, checkpoint, self.trust_remote_code)
        return ClipProcessor(
            checkpoint,
            config,
            self.prompt,
            trust_remote_code=self.trust_remote_code,
            cut_window=self.cut_window,
            long_clips=self.long_clips,  # type: ignore[arg-type]  # checked there
            modality=self.modality,  # type: ignore[arg-type]  # checked there
            frame_rate=self.frame_rate,
        )

    def answers_questions(self) -> bool:
        """Whether it can be asked in words; encoder-decoders such as Whisper cannot. Reads the config only."""
        from calm_pl.backbone.config import load_config

        config = load_config(resolve_checkpoint(self.path, self.revision), self.trust_remote_code, self.path)
        return not config.is_encoder_decoder

    def fingerprint(self, root: str | Path | None = None) -> dict[str, str]:
        """Content hash of every file that the model or its processor reads, by file name.

        Hashed once and remembered under ``root``, the folder of the head stores.
        """
        checkpoint = resolve_checkpoint(self.path, self.revision)
        return _digests(checkpoint, root, code=self.trust_remote_code)

    def adapter_fingerprint(self, root: str | Path | None = None) -> dict[str, str]:
        """The same of its adapter; empty without one."""
        if self.adapter is None:
            return {}
        return _digests(adapter_folder(self.adapter, resolve_checkpoint(self.path, self.revision)), root)

    def store_key(self, dtype: str = "float32", root: str | Path | None = None) -> Mapping[str, Any]:
        """Everything but the clip that decides a head output; a head store is keyed by it.

        ``attn_implementation`` and ``compile`` are left out: they change nothing but the rounding.
        """
        key: dict[str, Any] = {
            "backbone": self.name,
            "files": self.fingerprint(root),
            "heads": self.heads,
            "prompt": self.prompt,
            "dtype": dtype,
            "pooling": "last_token" if self.pooling == "last" else self.pooling,
            "layers": None if self.layers is None else sorted(self.layers),
            "cut_window": self.cut_window,
            "format": FORMAT_VERSION,
        }
        # Named only where used: stores made before there were these options stay valid.
        if self.long_clips != "cut":
            key["long_clips"] = self.long_clips
        if self.quantization is not None:
            key["quantization"] = self.quantization
        if self.adapter is not None:
            key["adapter"] = self.adapter_fingerprint(root)
        if self.modality != "audio":
            key |= {"modality": self.modality, "frame_rate": self.frame_rate}
        return key


def _digests(folder: Path, root: str | Path | None, code: bool = False) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file_digest(file, root) for file in _read_files(folder, code)}


def _read_files(folder: Path, code: bool = False) -> list[Path]:
    suffixes = (*FINGERPRINTED, ".py") if code else FINGERPRINTED
    files = {file for file in folder.iterdir() if file.suffix in suffixes and file.name not in UNREAD}
    files.update(folder / name for index in folder.glob("*.safetensors.index.json") for name in _weight_files(index))
    return sorted(file for file in files if file.is_file())


def _weight_files(index: Path) -> list[str]:
    """The files of weights that an index names, which may lie in folders below; none of a damaged one, whose weights
    cannot be loaded."""
    try:
        return list(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
