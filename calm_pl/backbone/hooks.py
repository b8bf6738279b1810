"""Taking head outputs out of a running model without changing it.

Shapes: B clips, R rows of an encoder (clips, or windows of clips), T tokens or frames, H heads of one block, K heads in
all, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.pooling import Pooling
from calm_pl.backbone.processing import LALMInputs
from calm_pl.backbone.structure import HeadSite
from calm_pl.backbone.tensor_parallel import whole

LAST_TOKEN = Pooling()


class StopForward(Exception):
    """Raised by the last hook: everything after it, the language-model head too, is not computed."""


class HeadCapture:
    """Collects the head outputs of one forward pass; holds B x K x D numbers and no sequence.

    Args:
        sites: where to read, in the order of K.
        inputs: the batch that is run: which of its tokens and frames are real.
        pooling: which tokens a decoder head is read at.
    """

    def __init__(
        self, sites: Sequence[HeadSite], inputs: LALMInputs | None = None, pooling: Pooling = LAST_TOKEN
    ) -> None:
        self.sites = sites
        self.inputs = inputs
        self.pooling = pooling
        self.outputs: dict[str, Tensor] = {}

    def take(self, site: HeadSite, x_BTE: Tensor) -> None:
        """Reduce one block's concatenated heads over T and keep the result."""
        assert self.inputs is not None
        if site.part == "decoder":
            x_BE = self.pooling(x_BTE, self.inputs)
        elif x_BTE.ndim == 3:
            x_BE = _mean_of_valid_frames(x_BTE, self.inputs)
        else:
            x_BE = _mean_of_packed_frames(x_BTE, self.inputs)
        x_BE = whole(x_BE, site.num_heads * site.head_dim)
        self.outputs[site.name] = x_BE.unflatten(-1, (site.num_heads, site.head_dim)).float()
        if len(self.outputs) == len(self.sites):
            raise StopForward

    def heads_BKD(self) -> Tensor:
        """All heads in the order of K, float32; narrower heads are padded with zeros to the largest D."""
        missing = [site.name for site in self.sites if site.name not in self.outputs]
        if missing:
            raise RuntimeError(f"the forward pass never reached {missing[0]} ({len(missing)} blocks in all)")
        width = max(site.head_dim for site in self.sites)
        blocks = [F.pad(self.outputs[site.name], (0, width - site.head_dim)) for site in self.sites]
        return torch.cat([block.to(blocks[0].device) for block in blocks], dim=1)


@contextmanager
def capture_heads(capture: HeadCapture) -> Iterator[HeadCapture]:
    """Hook every site for the length of the block; hooks are always removed, also after an error."""

    def pre_hook(site: HeadSite) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            capture.take(site, args[0])

        return hook

    handles = []
    try:
        for site in capture.sites:
            handles.append(site.projection.register_forward_pre_hook(pre_hook(site)))
        yield capture
    except StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _mean_of_valid_frames(x_RTE: Tensor, inputs: LALMInputs) -> Tensor:
    clip_R = inputs.clip_R.to(x_RTE.device)
    if len(x_RTE) != len(clip_R):
        return _mean_of_unfolded_frames(x_RTE, inputs)
    R, T, E = x_RTE.shape
    valid_R = torch.full((R,), T, device=x_RTE.device)
    if inputs.frames_R is not None and inputs.max_frames is not None:
        # The encoder's convolutions shorten max_frames to T; a row's share shrinks alike, rounded up.
        frames_R, max_frames = inputs.frames_R.to(x_RTE.device), inputs.max_frames
        valid_R = ((frames_R * T + max_frames - 1) // max_frames).clamp(1, T)
    mask_RT = torch.arange(T, device=x_RTE.device) < valid_R[:, None]
    sums_RE = (x_RTE.float() * mask_RT[..., None]).sum(1)
    B = len(inputs.last_token_B)
    valid_B = valid_R.new_zeros(B).index_add(0, clip_R, valid_R)
    return sums_RE.new_zeros(B, E).index_add(0, clip_R, sums_RE) / valid_B[:, None]


def _mean_of_unfolded_frames(x_RTE: Tensor, inputs: LALMInputs) -> Tensor:
    """Phi-4's encoder lays a clip beyond its window down in rows, the last of them padded; such a clip runs alone."""
    assert inputs.audio_BT is not None
    length_B = inputs.audio_BT.sum(1).tolist()  # one position per audio token
    R, T, _ = x_RTE.shape
    if len(length_B) > 1 or -(-length_B[0] // T) != R:
        raise BackboneError(
            f"the audio encoder has {R} rows of {T} positions, which do not fit the {length_B} audio tokens of the "
            "clips: use heads=decoder."
        )
    return x_RTE.flatten(0, 1)[: length_B[0]].float().mean(0, keepdim=True)


def _mean_of_packed_frames(x_TE: Tensor, inputs: LALMInputs) -> Tensor:
    """Omni's encoders lay the clips of a batch behind one another, without padding."""
    length_B = next((length_B for length_B in inputs.packed_lengths if sum(length_B) == len(x_TE)), None)
    if length_B is None:
        raise BackboneError(
            f"the audio encoder packs {len(x_TE)} positions, which fit neither the audio tokens nor the frames of "
            "the clips: use heads=decoder."
        )
    return torch.stack([x_tE.float().mean(0) for x_tE in x_TE.split(length_B)])
