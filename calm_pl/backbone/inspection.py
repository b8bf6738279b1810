"""What a checkpoint would give, from its config alone: no weight is read and none is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from calm_pl.backbone.catalogue import BF16_BYTES, FOUR_BIT_BYTES
from calm_pl.backbone.checkpoints import resolve_checkpoint
from calm_pl.backbone.config import load_config, model_class_of
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.processing import ClipProcessor
from calm_pl.backbone.structure import Heads, find_head_sites
from calm_pl.clip import Clip


@dataclass(frozen=True)
class Inspection:
    """What ``calm backbones inspect`` prints.

    Attributes:
        model: class of the model that would be loaded.
        decoder: layers x heads x head dimension, and K; or why no heads can be read.
        encoder: the same of the audio encoder.
        sampling_rate: Hz that audio is resampled to.
        max_seconds: the longest clip heard in one piece; None: any length.
        bf16_gb: gigabytes (1e9) of the weights in bfloat16.
        four_bit_gb: the same with linear layers in four bits.
        prompt: the whole prompt of a clip, with one token in place of the audio.
    """

    model: str
    decoder: str
    encoder: str
    sampling_rate: int
    max_seconds: float | None
    bf16_gb: float
    four_bit_gb: float
    prompt: str


def inspect_checkpoint(path_or_hub_id: str, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Read config and processor, build the model without memory, and look for its heads.

    Raises:
        BackboneError: the checkpoint cannot serve as a backbone; says why in one sentence.
    """
    folder = resolve_checkpoint(path_or_hub_id, revision, weights=False)
    config = load_config(folder, trust_remote_code, path_or_hub_id)
    model_class = model_class_of(config, path_or_hub_id, folder, trust_remote_code)
    processor = ClipProcessor(folder, config, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = model_class(getattr(config, "thinker_config", config))
    except (ImportError, ValueError) as error:
        raise BackboneError(f"{path_or_hub_id} cannot be built: {error}") from error
    prompt = f"its {len(processor.start_tokens)} start tokens" if processor.start_tokens else processor.text(Clip(""))
    sound = re.escape(processor.audio_token)
    if sound:
        prompt = re.sub(f"({sound})+", processor.audio_token, prompt)
    return Inspection(
        model=model_class.__name__,
        decoder=_heads(model, "decoder"),
        encoder=_encoder(model),
        sampling_rate=processor.sampling_rate,
        max_seconds=processor.max_seconds,
        bf16_gb=BF16_BYTES * sum(weight.numel() for weight in model.parameters()) / 1e9,
        four_bit_gb=_four_bit_bytes(model) / 1e9,
        prompt=prompt,
    )


def _heads(model: PreTrainedModel, heads: Heads) -> str:
    sites = find_head_sites(model, heads)
    layers = len({site.layer for site in sites})
    per_layer = " + ".join(str(site.num_heads) for site in sites if site.layer == sites[0].layer)
    width = max(site.head_dim for site in sites)
    return f"{layers} layers x {per_layer} heads x {width} = {sum(site.num_heads for site in sites)} heads"


def _encoder(model: PreTrainedModel) -> str:
    try:
        return _heads(model, "encoder")
    except BackboneError as error:
        return f"none ({error})"


def _four_bit_bytes(model: PreTrainedModel) -> float:
    head = model.get_output_embeddings()
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in linear)
    return sum(weight.numel() for weight in linear.values()) * FOUR_BIT_BYTES + BF16_BYTES * others
