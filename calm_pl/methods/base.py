"""What every method is: fitted on labelled heads, then a module from heads to probabilities.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from calm_pl.functional.checks import check_heads, check_labels


class HeadClassifier(nn.Module):
    """A few-shot classifier on head outputs.

    All that `fit` finds lies in buffers, so that a state dict (in a Lightning checkpoint or a safetensors
    file) is the whole classifier: an unfitted instance loads it and predicts.
    """

    choices_bytes: Tensor

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        """Learn from a support set and nothing else.

        Args:
            heads_NKD: head outputs, any floating dtype.
            labels_N: integer classes in [0, num_classes), every class present.
            num_classes: C.

        Raises:
            ValueError: naming the argument that makes no sense.
        """
        raise NotImplementedError

    def forward(self, queries_NKD: Tensor) -> Tensor:
        """Class probabilities of shape (N, C), float32, rows summing to 1."""
        raise NotImplementedError

    def choices(self) -> dict[str, Any]:
        """What was chosen on the support set, with its scores; ready for JSON."""
        found: dict[str, Any] = json.loads(bytes(self.choices_bytes.tolist()))
        return found

    def keep(self, choices: dict[str, Any], **buffers: Tensor) -> None:
        """Take what a fit found. The choices lie in a buffer too, as JSON, since state dicts hold tensors."""
        buffers["choices_bytes"] = torch.tensor(list(json.dumps(choices).encode()), dtype=torch.uint8)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach().contiguous())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key, tensor in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and "." not in name and name not in self._parameters:
                self.register_buffer(name, torch.empty_like(tensor))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_support(heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """The labels as int64, of a support set that makes sense.

    Raises:
        ValueError: naming the argument; also where a class has no clip.
    """
    check_heads("heads_NKD", heads_NKD)
    check_labels(labels_N, len(heads_NKD), num_classes)
    missing = (torch.bincount(labels_N, minlength=num_classes) == 0).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(f"labels_N has no clip of class {', '.join(map(str, missing))}: every class needs one")
    return labels_N.long()
