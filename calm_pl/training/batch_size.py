"""How many clips one forward pass takes: found by trying on a GPU, and halved where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from calm_pl.audio import AudioError
from calm_pl.backbone.content import Media
from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.processing import ClipProcessor, LALMInputs
from calm_pl.clip import Clip, length_batches

# Past this, larger batches are no faster on a GPU either, and a killed run loses more.
LARGEST_BATCH = 512
# Share of the free memory that stays free while trying: prompts differ between batches.
MARGIN = 0.1

# What CUDA's libraries say where they find no memory: cuBLAS, cuDNN, and torch where cuDNN has tried all its ways.
LIBRARIES_SAY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "unable to find an engine to execute this")

Pass = Callable[[LALMInputs], Tensor]


def run_in_halves(run: Pass, inputs: LALMInputs, tell: Callable[[int], None]) -> Tensor:
    """Run a batch; where memory does not suffice, its halves, and so on down to single clips.

    Args:
        tell: is called with the size of each batch that did not fit.

    Raises:
        BackboneError: memory does not suffice for one clip.
    """
    try:
        return run(inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        parts = _halves(inputs)
        if parts is None:
            raise BackboneError(
                f"out of memory with a batch of {len(inputs.last_token_B)} clips, which cannot be halved: use "
                "--trainer.precision bf16-true, --data.backbone.quantization 4bit, or a larger GPU."
            ) from error
    # Outside of the except clause, whose traceback keeps the tensors of the failed pass.
    torch.cuda.empty_cache()
    tell(len(inputs.last_token_B))
    return torch.cat([run_in_halves(run, part, tell) for part in parts])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ended, said by torch itself, in our words, or by one of CUDA's libraries."""
    causes = [e for e in (error, error.__cause__) if e is not None]
    return any(
        isinstance(e, torch.cuda.OutOfMemoryError) or is_oom_error(e) or any(words in str(e) for words in LIBRARIES_SAY)
        for e in causes
    )


def _halves(inputs: LALMInputs) -> list[LALMInputs] | None:
    """The inputs as two batches, padded as they are; None for one clip, or where a tensor has no row a clip or window.

    Of a batch in parts each part is halved, and it stays one batch: what it makes of its clips' pieces is its own.
    """
    if inputs.parts:
        halves = [_halves(part) or [part] for part in inputs.parts]
        parts = tuple(chain.from_iterable(halves))
        return [replace(inputs, parts=parts)] if len(parts) > len(inputs.parts) else None
    size = len(inputs.last_token_B)
    tensors = inputs.model_inputs.values()
    if size < 2 or not tensors or any(len(x) not in (size, len(inputs.clip_R)) for x in tensors):
        return None
    return [_rows(inputs, slice(None, size // 2)), _rows(inputs, slice(size // 2, None))]


def _rows(inputs: LALMInputs, rows: slice) -> LALMInputs:
    size = len(inputs.last_token_B)
    kept_R = torch.isin(inputs.clip_R, torch.arange(size, device=inputs.last_token_B.device)[rows])
    return replace(
        inputs,
        model_inputs={name: x[rows if len(x) == size else kept_R] for name, x in inputs.model_inputs.items()},
        last_token_B=inputs.last_token_B[rows],
        frames_R=None if inputs.frames_R is None else inputs.frames_R[kept_R],
        windows_B=None if inputs.windows_B is None else inputs.windows_B[rows],
    )


def fitting_batch_size(
    run: Pass, processor: ClipProcessor, clips: Sequence[Clip], device: torch.device, largest: int = LARGEST_BATCH
) -> int:
    """The largest power of two of copies of the longest clip that `run` has memory for, with a margin; at least 1.

    Args:
        device: whose memory it is.
        largest: no more than this is tried.
    """
    longest = _longest(processor, clips)
    if longest is None:
        return 1
    clip, media = longest
    ballast = _ballast(device)
    size = 1
    while 2 * size <= largest and _fits(run, processor([clip] * (2 * size), [media] * (2 * size))):
        size *= 2
    del ballast
    return size


def _longest(processor: ClipProcessor, clips: Sequence[Clip]) -> tuple[Clip, list[Media]] | None:
    for (index,) in length_batches(clips, 1):
        try:
            return clips[index], processor.load(clips[index])
        except AudioError:
            continue
    return None


def _ballast(device: torch.device) -> Tensor | None:
    """Memory kept back while trying."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()  # what torch keeps for later passes is free for these
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return torch.empty(int(MARGIN * free_bytes), dtype=torch.uint8, device=device)


def _fits(run: Pass, inputs: LALMInputs) -> bool:
    try:
        run(inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    torch.cuda.empty_cache()
    return False
