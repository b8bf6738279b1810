"""FrozenLALM: any audio-language model of transformers, frozen, with its attention heads readable.

Shapes: N clips, B batch, K heads in all, D head dimension.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from calm_pl.backbone.checkpoints import adapter_folder, resolve_checkpoint
from calm_pl.backbone.compilation import compile_layers
from calm_pl.backbone.config import load_config, model_class_of
from calm_pl.backbone.content import Modality
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.hooks import HeadCapture, capture_heads
from calm_pl.backbone.placement import Quantization, load_adapter, need, placement
from calm_pl.backbone.pooling import Pooling
from calm_pl.backbone.processing import ClipProcessor, LALMInputs, LongClips, PaddingSide
from calm_pl.backbone.structure import Heads, check_heads, find_head_sites
from calm_pl.backbone.tensor_parallel import check_cut, cutting, sharding
from calm_pl.backbone.window import float32_convolutions, shorter_encoder
from calm_pl.clip import DEFAULT_PROMPT, Clip, absolute_path, length_batches

ClipLike = Clip | str | os.PathLike[str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenLALM:
    """A frozen audio-language model that turns clips into head outputs.

    It is no ``nn.Module`` on purpose: no parameter of it can reach an optimiser, a checkpoint or DDP.

    Attributes:
        model: the transformers model, in eval mode, every parameter with ``requires_grad=False``.
        processor: turns clips into inputs; holds no weights, so worker processes can own a copy.
        num_layers: decoder layers (encoder layers where only the encoder is read).
        heads_per_layer: heads that one such layer gives.
        head_dim: D, the largest head dimension.
        head_names: K names such as ``decoder.3.self_attn.5``, in the order of K.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ClipProcessor,
        heads: Heads = "decoder",
        layers: Sequence[int] | None = None,
        pooling: str = "last",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        # VibeVoice adds noise to what it hears unless told otherwise; a clip shall have one head output.
        if noisy := getattr(model.config, "acoustic_tokenizer_encoder_config", None):
            noisy.vae_std = 0.0
        self.processor = processor
        self.pooling = Pooling.parse(pooling)
        if heads != "decoder" and not processor.content.hears:
            raise BackboneError(f"heads={heads}: with modality video nothing is heard; read the decoder.")
        self.sites = find_head_sites(model, heads, layers)
        self.head_names = [name for site in self.sites for name in site.head_names]
        self.head_dim = max(site.head_dim for site in self.sites)
        first_part = [site for site in self.sites if site.part == self.sites[0].part]
        self.num_layers = len({site.layer for site in first_part})
        self.heads_per_layer = sum(site.num_heads for site in first_part) // self.num_layers

    @property
    def num_heads(self) -> int:
        """K, all heads that are read."""
        return len(self.head_names)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        prompt: str = DEFAULT_PROMPT,
        heads: Heads = "decoder",
        attn_implementation: str | None = None,
        layers: Sequence[int] | None = None,
        cut_window: bool = True,
        padding_side: PaddingSide = "left",
        trust_remote_code: bool = False,
        pooling: str = "last",
        long_clips: LongClips = "cut",
        device_map: str | None = None,
        tensor_parallel: bool = False,
        quantization: Quantization | None = None,
        adapter: str | None = None,
        modality: Modality = "audio",
        frame_rate: float = 2.0,
        compile: bool = False,
    ) -> FrozenLALM:
        """Load an audio-language checkpoint by its config.

        Args:
            path_or_hub_id: ``calm-tiny``, ``random-qwen2-audio``, a folder, or a hub id.
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: where the model runs: ``cpu``, ``cuda`` or ``cuda:1``; unused with ``device_map``.
            revision: branch, tag or commit on the hub.
            prompt: text after the audio; ``{question}`` stands for the clip's own question.
            heads: ``decoder``, ``encoder`` or ``both`` (decoder heads first).
            attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``; None lets transformers choose.
            layers: decoder layers to read; nothing after the last of them is computed. None reads all.
            cut_window: run the audio encoder on the longest clip of a batch instead of its full window, where it
                masks padding.
            padding_side: of the prompts in a batch; results do not depend on it.
            trust_remote_code: run Python code that comes with the checkpoint. Off unless you trust its author.
            pooling: which prompt tokens a decoder head is read at: ``last``, ``last:N`` (mean of the last N) or
                ``audio`` (mean of the tokens that stand for sound).
            long_clips: ``cut`` clips at the model's window, or ``split`` them evenly and average the pieces' heads.
            device_map: ``auto`` spreads the layers over all GPUs (and needs accelerate); None uses ``device``.
            tensor_parallel: cut every decoder layer over all processes of torch.distributed (or of torchrun); each must
                then run the same batches, and gets all heads.
            quantization: ``4bit`` or ``8bit`` weights, by bitsandbytes.
            adapter: a LoRA adapter (needs peft): a folder, a folder inside the checkpoint, or a hub id.
            modality: what is taken of a clip: ``audio``, ``video`` or ``audiovisual`` (needs PyAV).
            frame_rate: frames a second of a video.
            compile: by ``torch.compile``, all of the layers but the attention that is read; equal up to rounding.

        Raises:
            BackboneError: no checkpoint there, no audio input, no network and nothing cached, no readable heads; no
                C++ compiler for ``compile``.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise BackboneError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}.")
            dtype = DTYPES[dtype]
        check_heads(heads)  # before the weights are read
        Pooling.parse(pooling)
        checkpoint = resolve_checkpoint(path_or_hub_id, revision)
        config = load_config(checkpoint, trust_remote_code, path_or_hub_id)
        model_class = model_class_of(config, path_or_hub_id, checkpoint, trust_remote_code)
        processor = ClipProcessor(
            checkpoint, config, prompt, padding_side, trust_remote_code, cut_window, long_clips, modality, frame_rate
        )
        where, folder = placement(device, device_map, quantization, dtype), None
        if tensor_parallel:
            options = {"device_map": device_map, "quantization": quantization, "adapter": adapter, "compile": compile}
            where |= sharding(device, [name for name, value in options.items() if value])
        is_cut = "distributed_config" in where
        if adapter is not None:  # all that may be missing, before the weights are read
            need("peft", "adapter")
            folder = adapter_folder(adapter, checkpoint)
        try:
            with cutting(device) if is_cut else nullcontext():
                loaded: Any = model_class.from_pretrained(
                    checkpoint,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    **where,
                )
            model, told = loaded
            if not where:
                model.to(device)
        except torch.cuda.OutOfMemoryError as error:
            raise BackboneError(
                f"{path_or_hub_id} does not fit on {device} in {dtype}: use dtype bfloat16, quantization 4bit, "
                "device_map auto, tensor_parallel on several GPUs, or a larger one."
            ) from error
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            hint = " (leave tensor_parallel out)" if is_cut else ""
            raise BackboneError(f"the weights of {path_or_hub_id} cannot be loaded: {error}{hint}") from error
        lalm = cls(model, processor, heads, layers, pooling)
        if is_cut:
            check_cut(model, lalm.sites, path_or_hub_id)
        if absent := _random_weights(model, told["missing_keys"]):
            raise BackboneError(
                f"{path_or_hub_id} lacks {len(absent)} weights that heads are read behind, such as {absent[0]}: they "
                "would be random. The checkpoint is not whole, or of another model than its config says."
            )
        if folder is not None:
            load_adapter(model, folder)
        if compile:
            compile_layers(model, lalm.sites)
        return lalm

    @torch.inference_mode()
    def forward(self, inputs: LALMInputs) -> Tensor:
        """Run one batch; return its head outputs (B, K, D), float32, on the model's device.

        The pass ends at the last head that is read: the language-model head is never run.

        Raises:
            BackboneError: out of memory; says the batch size.
        """
        if inputs.parts:
            return inputs.in_parts(self.forward)
        inputs = inputs.to(self.device, self.model.dtype)
        capture = HeadCapture(self.sites, inputs, self.pooling)
        try:
            with capture_heads(capture), self.window(inputs):
                self.model(**inputs.model_inputs, use_cache=False)
        except torch.cuda.OutOfMemoryError as error:
            raise BackboneError(
                f"out of memory with a batch of {len(inputs.last_token_B)} clips: lower the batch size "
                "(--data.batch_size), or use bf16-true precision."
            ) from error
        return capture.heads_BKD()

    @contextmanager
    def window(self, inputs: LALMInputs) -> Iterator[None]:
        """The audio encoder fitted to the length of these inputs, and exact in float32, for the length of a block."""
        with float32_convolutions(), shorter_encoder(self.model, inputs.model_inputs.get("input_features")):
            yield

    def head_outputs(self, clips: Sequence[ClipLike], batch_size: int = 8) -> Tensor:
        """Decode clips and return their head outputs (N, K, D), float32 on the CPU, in the clips' order.

        Clips are run in batches of similar length; the result is the same for every batch size (1e-4 in float32).

        Raises:
            AudioError: a clip that cannot be used, named.
            ValueError: ``batch_size`` below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1 clip a batch.")
        wanted = [as_clip(clip) for clip in clips]
        self.processor.warn_of_cut_clips(wanted)
        heads_NKD = torch.empty(len(wanted), self.num_heads, self.head_dim)
        for batch in length_batches(wanted, batch_size):
            chosen = [wanted[i] for i in batch]
            inputs = self.processor(chosen, [self.processor.load(clip) for clip in chosen])
            heads_NKD[batch] = self.forward(inputs).cpu()
        return heads_NKD


def _random_weights(model: PreTrainedModel, missing: Collection[str]) -> list[str]:
    """Of weights that the checkpoint lacks, those that are run: all but the language-model head's."""
    head = model.get_output_embeddings()
    unread = set() if head is None else {id(weight) for weight in head.parameters()}
    return sorted(name for name, weight in model.named_parameters() if name in missing and id(weight) not in unread)


def as_clip(clip: ClipLike) -> Clip:
    """A path is a clip without a label."""
    return clip if isinstance(clip, Clip) else Clip(absolute_path(clip))
