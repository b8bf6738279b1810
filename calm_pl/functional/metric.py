"""The within-head metric: each head's own variation inside the classes, divided out before cosines.

Shapes: N clips, K heads, D head dimension, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calm_pl.functional.checks import check_heads, check_labels
from calm_pl.functional.heads import chunks, class_means, default_chunk_size

# Smallest eigenvalue relative to the largest: only a singular covariance with g = 0 ever meets it.
MIN_EIGENVALUE = 1e-6
ROUNDING = 1e-6  # a deviation this small beside a head's largest number is rounding
ESTIMATES = ("ledoit_wolf", "oas")


@dataclass(frozen=True)
class HeadMetric:
    """Eigenvectors and eigenvalues of every head's variation inside the classes: any g then costs a scaling.

    Attributes:
        mean_KD: the centre, `centre` times the mean of the prototypes.
        vectors_KDD: eigenvectors of the covariance S in columns.
        values_KD: eigenvalues, divided by scale_K.
        scale_K: tr S / D, with D the dimensions that are not padding; 1 for a head that does not vary.
        fourth_K: mean over clips of the squared residuals' sum, squared, divided by scale_K squared.
        dimension_K: dimensions that are not padding (those that are not zero in every clip).
        freedom: N - C, counting classes that have clips.
        centre: how far from the origin toward the mean of the prototypes the centre lies.
    """

    mean_KD: Tensor
    vectors_KDD: Tensor
    values_KD: Tensor
    scale_K: Tensor
    fourth_K: Tensor
    dimension_K: Tensor
    freedom: int
    centre: float = 1.0

    @classmethod
    def estimate(cls, heads_NKD: Tensor, labels_N: Tensor, num_classes: int, centre: float = 1.0) -> HeadMetric:
        """From labelled clips, one pass in chunks and one batched eigendecomposition."""
        prototypes_CKD = class_means(heads_NKD, labels_N, num_classes)
        present_C = torch.bincount(labels_N, minlength=num_classes) > 0
        _, num_heads, width = prototypes_CKD.shape
        scatter_KDD = torch.zeros(num_heads, width, width, device=heads_NKD.device)
        fourth_K = torch.zeros(num_heads, device=heads_NKD.device)
        used_KD = torch.zeros(num_heads, width, dtype=torch.bool, device=heads_NKD.device)
        for chunk in chunks(len(heads_NKD), default_chunk_size(num_heads, width)):
            residuals_KND = (heads_NKD[chunk].float() - prototypes_CKD[labels_N[chunk]]).transpose(0, 1)
            scatter_KDD += residuals_KND.mT @ residuals_KND
            fourth_K += residuals_KND.square().sum(2).square().sum(1)
            used_KD |= (heads_NKD[chunk] != 0).any(0)
        freedom = len(heads_NKD) - int(present_C.sum())
        covariance_KDD = scatter_KDD / max(1, freedom)
        dimension_K = used_KD.sum(1).clamp_min(1)
        scale_K = covariance_KDD.diagonal(dim1=1, dim2=2).sum(1) / dimension_K
        mean_KD = centre * prototypes_CKD[present_C].mean(0)
        # A head that says the same of every clip varies by the rounding of its means alone.
        rounding_K = (ROUNDING * prototypes_CKD.abs().amax((0, 2))).square()
        varies_K = scale_K > rounding_K
        scale_K = torch.where(varies_K, scale_K, 1.0)
        covariance_KDD = torch.where(varies_K[:, None, None], covariance_KDD / scale_K[:, None, None], 0.0)
        # In float32 the decomposition fails to converge on some covariances of few clips.
        values_KD, vectors_KDD = (part.float() for part in torch.linalg.eigh(covariance_KDD.double()))
        fourth_K = fourth_K / scale_K.square() / max(1, len(heads_NKD))
        return cls(mean_KD, vectors_KDD, values_KD.clamp_min(0), scale_K, fourth_K, dimension_K, freedom, centre)

    def around(self, centre: float) -> HeadMetric:
        """The same metric around another share of the mean of the prototypes."""
        return replace(self, mean_KD=self.mean_KD * (centre / self.centre), centre=centre)

    def shrinkage_of_heads(self, shrinkage: float | str | Tensor) -> Tensor:
        """g of every head (K,), from one number, one a head, or the name of a formula, `ledoit_wolf` or `oas`."""
        if isinstance(shrinkage, str):
            if shrinkage not in ESTIMATES:
                raise ValueError(f"shrinkage must be a number from 0 to 1 or one of {ESTIMATES}; got {shrinkage!r}")
            estimated_K: Tensor = getattr(self, shrinkage)()
            return estimated_K
        shrinkage_K = torch.as_tensor(shrinkage, dtype=torch.float32, device=self.mean_KD.device)
        if not bool(((shrinkage_K >= 0) & (shrinkage_K <= 1)).all()):
            raise ValueError(f"shrinkage must be between 0 and 1; got {shrinkage}")
        return shrinkage_K.expand(len(self.mean_KD))

    def inverse_roots(self, shrinkage: float | str | Tensor) -> Tensor:
        """Eigenvalues of A^(-1/2), A = (1 - g) S + g (tr S / D) I: (K, D)."""
        shrinkage_K1 = self.shrinkage_of_heads(shrinkage)[:, None]
        values_KD = (1 - shrinkage_K1) * self.values_KD + shrinkage_K1
        largest_K1 = values_KD.amax(1, keepdim=True)
        # A head without variation inside its classes has no metric but the identity, whatever g.
        values_KD = torch.where(largest_K1 > 0, values_KD.clamp_min(largest_K1 * MIN_EIGENVALUE), 1.0)
        return (values_KD * self.scale_K[:, None]).rsqrt()

    def transform(self, shrinkage: float | str | Tensor) -> Tensor:
        """A^(-1/2), symmetric: (K, D, D)."""
        return (self.vectors_KDD * self.inverse_roots(shrinkage)[:, None]) @ self.vectors_KDD.mT

    def ledoit_wolf(self) -> Tensor:
        """The g of each head that Ledoit and Wolf (2004) derive for the covariance of independent samples:
        (K,)."""
        count = max(1, self.freedom)
        square_K = self.values_KD.square().sum(1)
        distance_K = (square_K - self.dimension_K).clamp_min(1e-12)
        return ((self.fourth_K - square_K) / count / distance_K).clamp(0, 1)

    def oas(self) -> Tensor:
        """The g of each head by oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698): (K,)."""
        square_K, dimension_K = self.values_KD.square().sum(1), self.dimension_K
        trace_square_K = dimension_K.float().square()
        over_K = (1 - 2 / dimension_K) * square_K + trace_square_K
        under_K = (max(1, self.freedom) + 1 - 2 / dimension_K) * (square_K - dimension_K).clamp_min(1e-12)
        return (over_K / under_K).clamp(0, 1)


def whitening(
    heads_NKD: Tensor, labels_N: Tensor, num_classes: int, shrinkage: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The within-head metric: how each head varies inside the classes, to be divided out before cosines.

    In head k, S is the pooled within-class covariance (residuals from the class means, divided by N - C) and
    A = (1 - g) S + g (tr S / D) I. Dimensions that are zero in every clip are padding and count in no D. The
    idea of shrinking toward a scaled identity is Ledoit and Wolf's (2004).

    Args:
        heads_NKD: head outputs of labelled clips, any floating dtype.
        labels_N: integer classes in [0, num_classes).
        num_classes: C.
        shrinkage: g in [0, 1], one for all heads or a tensor (K,). g = 1, and also any g where no class has
            two clips or a head does not vary inside its classes, leaves cosines of centred vectors.

    Returns:
        mean_KD, the mean of the prototypes of the classes that have clips, and transform_KDD, A^(-1/2)
        (symmetric), both float32.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_heads("heads_NKD", heads_NKD)
    check_labels(labels_N, len(heads_NKD), num_classes)
    metric = HeadMetric.estimate(heads_NKD, labels_N, num_classes)
    return metric.mean_KD, metric.transform(shrinkage)


def whiten(heads_NKD: Tensor, mean_KD: Tensor, transform_KDD: Tensor) -> Tensor:
    """Head vectors (or prototypes) in the within-head metric: (h - mean) A^(-1/2), shape (N, K, D), float32.

    Raises:
        ValueError: naming the argument that makes no sense.
    """
    check_heads("heads_NKD", heads_NKD)
    num_heads, width = heads_NKD.shape[1:]
    for name, tensor, shape in (
        ("mean_KD", mean_KD, (num_heads, width)),
        ("transform_KDD", transform_KDD, (num_heads, width, width)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
    centred_KND = (heads_NKD.float() - mean_KD.float()).transpose(0, 1)
    return (centred_KND @ transform_KDD.float()).transpose(0, 1)
