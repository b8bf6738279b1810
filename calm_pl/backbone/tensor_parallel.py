"""One model over the processes of a run, every layer cut into as many parts: transformers' own tensor parallelism.

Shapes: B clips, E a block's heads side by side, e the part of them that this process computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.structure import HeadSite

# It takes a row of its embedding where that is cut.
UNCUTTABLE = ("gemma4",)


def processes() -> int:
    """How many processes this run has; before they have met, how many a launcher has said that there will be."""
    return distributed.get_world_size() if distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the first of them."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def sharding(device: str | torch.device, others: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that cut a model over all processes; none for a single process, which has it
    whole.

    Args:
        device: where this process computes.
        others: options in use that do not go together with it.

    Raises:
        BackboneError: there are such, or transformers would take another device than this process has.
    """
    if others:
        raise BackboneError(f"tensor_parallel cannot be had together with {', '.join(others)}: leave one out.")
    if processes() == 1:
        return {}
    taken = torch._C._get_accelerator().type
    if taken != torch.device(device).type:
        raise BackboneError(f"tensor_parallel on {device}: transformers takes this machine's {taken} for it.")
    return {"distributed_config": DistributedConfig(tp_size=processes())}


@contextmanager
def cutting(device: str | torch.device) -> Iterator[None]:
    """Around a load by `sharding`: `LOCAL_RANK` is the number of this process's GPU, by which transformers takes one.

    SLURM does not set it, and a run need not use the first GPUs of its machine.
    """
    before, index = os.environ.get("LOCAL_RANK"), torch.device(device).index
    try:
        if index is not None:
            os.environ["LOCAL_RANK"] = str(index)
        yield
    except ValueError:  # it is about the model, and so in every process
        meet()
        raise
    finally:
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
        else:
            os.environ["LOCAL_RANK"] = before


def meet() -> None:
    """Wait for all processes: one that ends in an error while others connect would hide it behind theirs."""
    if distributed.is_initialized():
        distributed.barrier()


def check_cut(model: PreTrainedModel, sites: Sequence[HeadSite], name: str | os.PathLike[str]) -> None:
    """Look at a model that transformers was told to cut.

    Raises:
        BackboneError: it is not cut where heads are read, cannot run when it is, or a block's heads are not as many in
            every process.
    """
    meet()
    cut = [site for site in sites if any(isinstance(weight, DTensor) for weight in site.projection.parameters())]
    if not cut or model.config.model_type in UNCUTTABLE:
        raise BackboneError(
            f"transformers has no way to cut a {type(model).__name__} over processes: leave tensor_parallel out for "
            f"{name}, or use device_map auto in one process."
        )
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", None)  # heads that share keys and values
    for count in (*(site.num_heads for site in cut), *([groups] if groups else [])):
        if count % processes():
            raise BackboneError(
                f"the heads of {name}, {count} in a block or with keys of their own, cannot be dealt to {processes()} "
                "processes: take a number that divides them."
            )


def whole(x_Be: Tensor, width: int) -> Tensor:
    """The heads of all processes side by side (B, E), where these are a part of them. A collective call then."""
    if x_Be.shape[-1] == width:
        return x_Be
    parts = [torch.empty_like(x_Be) for _ in range(processes())]
    distributed.all_gather(parts, x_Be.contiguous())
    return torch.cat(parts, dim=-1)
