"""Where a model's attention heads can be read, found by structure and not by a list of model names.

A *head site* is one linear layer whose input is the concatenation of its block's head outputs: the output projection
of an attention block. Decoder blocks are read at the last prompt token, encoder blocks as a mean over valid frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from calm_pl.backbone.errors import BackboneError

Heads = Literal["decoder", "encoder", "both"]
# An attention block's output projection goes by one of these names throughout transformers, and one of its queries'
# names tells an attention block from other blocks with such a projection.
PROJECTIONS = ("o_proj", "out_proj", "to_out", "post")
QUERIES = ("q_proj", "qkv_proj", "to_q", "q_b_proj")
# The width of one head's output. Latent attention has values narrower than keys, so `v_head_dim` comes first.
HEAD_DIMS = ("v_head_dim", "head_dim", "dim_head")


@dataclass(frozen=True)
class HeadSite:
    """One attention block: the input of ``projection`` is (B, T, num_heads * head_dim)."""

    name: str  # "decoder.3.self_attn"
    projection: nn.Module
    num_heads: int
    head_dim: int
    part: Literal["decoder", "encoder"]

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1])

    @property
    def head_names(self) -> list[str]:
        return [f"{self.name}.{head}" for head in range(self.num_heads)]


def check_heads(heads: str) -> None:
    """Refuse what is none of `Heads`.

    Raises:
        BackboneError: naming them.
    """
    if heads not in get_args(Heads):
        raise BackboneError(f"heads={heads!r} is unknown: choose one of {', '.join(get_args(Heads))}.")


def find_head_sites(
    model: PreTrainedModel, heads: Heads = "decoder", layers: Sequence[int] | None = None
) -> list[HeadSite]:
    """Return the head sites of ``model`` in the order of K: decoder first, layer-major.

    In an encoder-decoder model each decoder layer gives its self-attention heads, then its cross-attention heads.

    Args:
        model: the loaded model.
        heads: ``decoder``, ``encoder`` or ``both``.
        layers: the decoder layers to read (of ``heads="encoder"``, the encoder layers); None reads all.

    Raises:
        BackboneError: ``heads`` is unknown, a layer does not exist, or the part asked for has no attention block
            that can be read.
    """
    check_heads(heads)
    sites: list[HeadSite] = []
    if heads in ("decoder", "both"):
        sites += _sites_of(_decoder(model), "decoder")
    if heads in ("encoder", "both"):
        sites += _sites_of(audio_encoder(model), "encoder")
    return sites if layers is None else _only_layers(sites, layers)


def _only_layers(sites: list[HeadSite], layers: Sequence[int]) -> list[HeadSite]:
    limited = sites[0].part
    found = sorted({site.layer for site in sites if site.part == limited})
    unknown = sorted(set(layers) - set(found))
    if unknown or not layers:
        gaps = found[-1] - found[0] >= len(found)  # state-space layers and experts between them (Nemotron)
        there = f"heads in the layers {', '.join(map(str, found))}" if gaps else f"the layers {found[0]} to {found[-1]}"
        raise BackboneError(f"layers={list(layers)}: the {limited} has {there}.")
    return [site for site in sites if site.part != limited or site.layer in layers]


def _sites_of(tower: nn.Module, part: Literal["decoder", "encoder"]) -> list[HeadSite]:
    for stack in (child for child in tower.children() if isinstance(child, nn.ModuleList)):
        sites = [
            _site(f"{part}.{index}.{block}", attention, part)
            for index, layer in enumerate(stack)
            for block, attention in _attention_blocks(layer)
        ]
        if sites:
            return sites
    raise BackboneError(
        f"{type(tower).__name__} has no attention heads that can be read: none of its layers has a block "
        f"with {', '.join(PROJECTIONS[:-1])} or {PROJECTIONS[-1]}; "
        f"{'use heads=decoder' if part == 'encoder' else 'choose another model'}."
    )


def _attention_blocks(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, block in layer.named_modules():
        if _projection(block) is not None and _first(block, QUERIES) is not None:
            yield name, block


def _projection(block: nn.Module) -> nn.Module | None:
    return next((getattr(block, name) for name in PROJECTIONS if hasattr(block, name)), None)


def _first(block: nn.Module, names: Sequence[str]) -> Any:
    """The first of these attributes that ``block`` or a module inside it has (Gemma 3n nests its attention)."""
    found = (getattr(m, name, None) for m in block.modules() for name in names)
    return next((value for value in found if value is not None), None)


def _site(name: str, attention: nn.Module, part: Literal["decoder", "encoder"]) -> HeadSite:
    projection = _projection(attention)
    assert projection is not None
    width = int(_first(projection, ("in_features",)))
    head_dim = _first(attention, HEAD_DIMS) or width // int(_first(attention, ("num_heads",)))
    return HeadSite(name, projection, width // int(head_dim), int(head_dim), part)


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder: nn.Module = model.get_decoder()
    while not hasattr(decoder, "layers") and decoder.get_decoder() is not decoder:  # type: ignore[operator]
        decoder = decoder.get_decoder()  # type: ignore[operator]  # Granite Speech holds a whole causal language model
    return decoder


def audio_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of ``model`` that hears.

    Raises:
        BackboneError: it has none of its own.
    """
    if model.config.is_encoder_decoder:
        encoder: PreTrainedModel = model.get_encoder()
        return encoder
    config = getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None)
    config = getattr(config, "asr_config", config)  # Nemotron Transcribe has another encoder, for who is speaking
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part.config) is type(config):
            return part
    raise BackboneError(f"{type(model).__name__} has no audio encoder of its own: use heads=decoder.")
