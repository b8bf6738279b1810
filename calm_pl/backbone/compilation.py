"""`torch.compile` for a model whose heads are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from calm_pl.backbone.errors import BackboneError
from calm_pl.backbone.structure import HeadSite

# One kernel already: nothing to fuse with.
SINGLE_KERNELS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity)


def compile_layers(model: nn.Module, sites: Sequence[HeadSite]) -> None:
    """Compile in place the largest parts of every layer that hold no head site.

    Hooks are put on and taken off again, and the last of them ends the pass by an exception; compiled code notices
    neither with certainty. So an attention block that is read, and what encloses it, stays as it is, and layers that
    are not read are compiled whole. Lengths and batch sizes are symbolic: other ones are not compiled anew.

    Raises:
        BackboneError: torch cannot compile here; says why.
    """
    _try(next(model.parameters()).device)
    read = {site.projection for site in sites}
    for layer in _layers(model):
        for part in _parts_without(layer, read):
            part.compile(dynamic=True)


def _try(device: torch.device) -> None:
    try:
        torch.compile(torch.cos)(torch.zeros(2, device=device))
    except RuntimeError as error:  # of torch's compiler, which has many
        raise BackboneError(
            f"compile=true, but torch cannot compile here ({str(error).splitlines()[0]}): install a C++ compiler "
            "(g++) and Python's headers, or leave compile off."
        ) from error


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of every tower."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def _parts_without(module: nn.Module, read: set[nn.Module]) -> Iterator[nn.Module]:
    if read.isdisjoint(module.modules()):
        if not isinstance(module, SINGLE_KERNELS):
            yield module
    elif module not in read:
        for child in module.children():
            yield from _parts_without(child, read)
