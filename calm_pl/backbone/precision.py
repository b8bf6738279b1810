"""What a Trainer's precision means for frozen weights."""

from __future__ import annotations

# Under "-mixed" they stay float32 and autocast does the rest.
PRECISION_DTYPES = {
    "32-true": "float32",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "bf16-mixed": "float32",
    "16-mixed": "float32",
}


def weights_dtype(precision: str) -> str:
    """The dtype of frozen weights under a Trainer's precision. Raises ValueError for one that has no meaning here."""
    if precision not in PRECISION_DTYPES:
        raise ValueError(f"precision={precision!r}: backbones run in {', '.join(PRECISION_DTYPES)}.")
    return PRECISION_DTYPES[precision]


def arithmetic(precision: str) -> str:
    """What a head output was computed in, for store keys: the dtype of the weights, or under "-mixed" the precision."""
    dtype = weights_dtype(precision)
    return precision if precision.endswith("-mixed") else dtype
