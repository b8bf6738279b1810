"""Large models on small machines: several GPUs, fewer bits, and low-rank adapters."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel

from calm_pl.backbone.errors import BackboneError

Quantization = Literal["4bit", "8bit"]


def placement(
    device: str | torch.device, device_map: str | None, quantization: Quantization | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that say where weights go and in how many bits; none for a plain load.

    Raises:
        BackboneError: a package that this needs is missing, or ``quantization`` is unknown.
    """
    arguments: dict[str, Any] = {}
    if device_map is not None or quantization is not None:
        need("accelerate", "device_map and quantization")
        arguments["device_map"] = device_map or {"": str(device)}
    if quantization is not None:
        if quantization not in get_args(Quantization):
            raise BackboneError(f"quantization={quantization!r} is unknown: choose 4bit or 8bit.")
        need("bitsandbytes", f"quantization={quantization}")
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "4bit",
            load_in_8bit=quantization == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    return arguments


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put a LoRA adapter into ``model``; heads are then read behind it.

    Raises:
        BackboneError: the adapter cannot be read, or does not fit the model in every weight: transformers would leave
            out what has no place, and keep at random what has no value.
    """
    try:
        found = model.load_adapter(str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BackboneError(f"the adapter {folder} cannot be loaded into {type(model).__name__}: {error}") from error
    if odd := sorted({*found.missing_keys, *found.unexpected_keys}):
        raise BackboneError(
            f"the adapter {folder} was made for another model than {type(model).__name__}, or is of a kind that "
            f"transformers cannot load: {len(odd)} of its weights and places do not meet, such as {odd[0]}"
        )


def need(package: str, what: str) -> None:
    """Raise BackboneError where a package is not installed."""
    if find_spec(package) is None:
        raise BackboneError(f"{what} needs the package {package}: pip install {package}.")
