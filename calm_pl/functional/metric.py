"""The within-head metric: each head's own variation inside the classes, divided out before cosines.

Shapes: N clips, K heads, D head dimension, C classes, M = min(N, D) dimensions that the clips span, R of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calm_pl.functional.checks import check_heads, check_labels
from calm_pl.functional.heads import Rows, chunks, class_means, default_chunk_size
from calm_pl.functional.precision import without_autocast

# Smallest eigenvalue relative to the largest: only a singular covariance with g = 0 ever meets it.
MIN_EIGENVALUE = 1e-6
ROUNDING = 1e-6  # a deviation this small beside a head's largest number is rounding
ESTIMATES = ("ledoit_wolf", "oas")


@dataclass(frozen=True)
class HeadMetric:
    """Eigenvectors and eigenvalues of every head's variation inside the classes: any g then costs a scaling.

    Fewer clips than dimensions span only as many dimensions as they are: nothing larger is decomposed or kept.

    Attributes:
        mean_KD: the centre, `centre` times the mean of the prototypes.
        vectors_KDM: eigenvectors of the covariance S in columns, the largest last; a basis of all that the clips span.
        values_KM: eigenvalues, divided by scale_K.
        scale_K: tr S / D, with D the dimensions that are not padding; 1 for a head that does not vary.
        fourth_K: mean over clips of the squared residuals' sum, squared, divided by scale_K squared.
        dimension_K: dimensions that are not padding (those that are not zero in every clip).
        freedom: N - C, counting classes that have clips.
        rank: how many of the largest eigenvalues differ from the rest.
        centre: how far from the origin toward the mean of the prototypes the centre lies.
    """

    mean_KD: Tensor
    vectors_KDM: Tensor
    values_KM: Tensor
    scale_K: Tensor
    fourth_K: Tensor
    dimension_K: Tensor
    freedom: int
    rank: int
    centre: float = 1.0

    @classmethod
    @without_autocast
    def estimate(
        cls, heads_NKD: Tensor | Rows, labels_N: Tensor, num_classes: int, centre: float = 1.0, whole: bool = False
    ) -> HeadMetric:
        """From labelled clips, one pass in chunks and one batched eigendecomposition.

        Args:
            heads_NKD: head outputs.
            labels_N: their classes.
            num_classes: C.
            centre: share of the mean of the prototypes.
            whole: M = D also where the clips are fewer, for vectors that had no part in the metric.
        """
        prototypes_CKD = class_means(heads_NKD, labels_N, num_classes)
        present_C = torch.bincount(labels_N, minlength=num_classes) > 0
        basis_KDM = None if whole or len(heads_NKD) >= heads_NKD.shape[2] else _basis(heads_NKD[:])
        _, num_heads, width = prototypes_CKD.shape
        size = width if basis_KDM is None else basis_KDM.shape[2]
        scatter_KMM = torch.zeros(num_heads, size, size, device=heads_NKD.device)
        fourth_K = torch.zeros(num_heads, device=heads_NKD.device)
        used_KD = torch.zeros(num_heads, width, dtype=torch.bool, device=heads_NKD.device)
        for chunk in chunks(len(heads_NKD), default_chunk_size(num_heads, width)):
            residuals_KNM = (heads_NKD[chunk].float() - prototypes_CKD[labels_N[chunk]]).transpose(0, 1)
            if basis_KDM is not None:
                residuals_KNM = residuals_KNM @ basis_KDM
            scatter_KMM += residuals_KNM.mT @ residuals_KNM
            fourth_K += residuals_KNM.square().sum(2).square().sum(1)
            used_KD |= (heads_NKD[chunk] != 0).any(0)
        freedom = len(heads_NKD) - int(present_C.sum())
        covariance_KMM = scatter_KMM / max(1, freedom)
        dimension_K = used_KD.sum(1).clamp_min(1)
        scale_K = covariance_KMM.diagonal(dim1=1, dim2=2).sum(1) / dimension_K
        mean_KD = centre * prototypes_CKD[present_C].mean(0)
        # A head that says the same of every clip varies by the rounding of its means alone.
        rounding_K = (ROUNDING * prototypes_CKD.abs().amax((0, 2))).square()
        varies_K = scale_K > rounding_K
        scale_K = torch.where(varies_K, scale_K, 1.0)
        covariance_KMM = torch.where(varies_K[:, None, None], covariance_KMM / scale_K[:, None, None], 0.0)
        # In float32 the decomposition fails to converge on some covariances of few clips.
        values_KM, vectors_KDM = (part.float() for part in torch.linalg.eigh(covariance_KMM.double()))
        if basis_KDM is not None:
            vectors_KDM = basis_KDM @ vectors_KDM
        values_KM = values_KM.clamp_min(0)
        fourth_K = fourth_K / scale_K.square() / max(1, len(heads_NKD))
        rank = min(freedom, size - 1)
        return cls(mean_KD, vectors_KDM, values_KM, scale_K, fourth_K, dimension_K, freedom, rank, centre)

    def around(self, centre: float) -> HeadMetric:
        """The same metric around another share of the mean of the prototypes."""
        return replace(self, mean_KD=self.mean_KD * (centre / self.centre), centre=centre)

    def of_rank(self, rank: int) -> HeadMetric:
        """The metric with no more than its `rank` largest eigenvalues; the others count as their mean, as in
        probabilistic principal components (Tipping and Bishop 1999).

        Raises:
            ValueError: when the rank is below 0.
        """
        if rank < 0:
            raise ValueError(f"rank must be at least 0; got {rank}")
        if rank >= self.rank:
            return self
        values_KM, rest = self.values_KM.clone(), self.values_KM.shape[1] - rank
        others_K = (self.dimension_K - rank).clamp_min(1)
        values_KM[:, :rest] = (values_KM[:, :rest].sum(1) / others_K)[:, None]
        return replace(self, values_KM=values_KM, rank=rank)

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
        """Eigenvalues of A^(-1/2), A = (1 - g) S + g (tr S / D) I, along the eigenvectors: (K, M)."""
        shrinkage_K1 = self.shrinkage_of_heads(shrinkage)[:, None]
        values_KM = (1 - shrinkage_K1) * self.values_KM + shrinkage_K1
        largest_K1 = values_KM.amax(1, keepdim=True)
        # A head without variation inside its classes has no metric but the identity, whatever g.
        values_KM = torch.where(largest_K1 > 0, values_KM.clamp_min(largest_K1 * MIN_EIGENVALUE), 1.0)
        return (values_KM * self.scale_K[:, None]).rsqrt()

    def factors(self, shrinkage: float | str | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A^(-1/2) as rest (I + axes diag(stretch) axes'): axes (K, D, R), stretch (K, R), rest (K,), R the rank.

        Few clips make small factors: at one clip a class there are none.
        """
        roots_KM = self.inverse_roots(shrinkage)
        # Every other direction, in what the clips span or out of it, has the smallest eigenvalue.
        rest_K1 = roots_KM[:, :1]
        first = roots_KM.shape[1] - self.rank
        return self.vectors_KDM[:, :, first:], roots_KM[:, first:] / rest_K1 - 1, rest_K1[:, 0]

    @without_autocast
    def transform(self, shrinkage: float | str | Tensor) -> Tensor:
        """A^(-1/2), symmetric: (K, D, D)."""
        axes_KDR, stretch_KR, rest_K = self.factors(shrinkage)
        identity_DD = torch.eye(axes_KDR.shape[1], device=axes_KDR.device)
        return rest_K[:, None, None] * (identity_DD + (axes_KDR * stretch_KR[:, None]) @ axes_KDR.mT)

    def ledoit_wolf(self) -> Tensor:
        """The g of each head that Ledoit and Wolf (2004) derive for the covariance of independent samples: (K,)."""
        count = max(1, self.freedom)
        square_K = self.values_KM.square().sum(1)
        distance_K = (square_K - self.dimension_K).clamp_min(1e-12)
        return ((self.fourth_K - square_K) / count / distance_K).clamp(0, 1)

    def oas(self) -> Tensor:
        """The g of each head by oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698): (K,)."""
        square_K, dimension_K = self.values_KM.square().sum(1), self.dimension_K
        trace_square_K = dimension_K.square()
        over_K = (1 - 2 / dimension_K) * square_K + trace_square_K
        under_K = (max(1, self.freedom) + 1 - 2 / dimension_K) * (square_K - dimension_K).clamp_min(1e-12)
        return (over_K / under_K).clamp(0, 1)


@without_autocast
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
    if not len(heads_NKD):
        raise ValueError("heads_NKD holds no clip: the metric needs at least one")
    metric = HeadMetric.estimate(heads_NKD, labels_N, num_classes)
    return metric.mean_KD, metric.transform(shrinkage)


def _basis(heads_NKD: Tensor) -> Tensor:
    """An orthonormal basis of what each head says of clips that are fewer than its dimensions: (K, D, N)."""
    basis_KDN: Tensor = torch.linalg.qr(heads_NKD.float().permute(1, 2, 0))[0]
    return basis_KDN


@without_autocast
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


@without_autocast
def whiten_by_factors(
    heads_NKD: Tensor, mean_KD: Tensor, axes_KDR: Tensor, stretch_KR: Tensor, rest_K: Tensor
) -> Tensor:
    """`whiten` by the factors of A^(-1/2) (`HeadMetric.factors`), without a D x D matrix a head: (N, K, D), float32."""
    centred_KND = (heads_NKD.float() - mean_KD).transpose(0, 1)
    along_KNR = centred_KND @ axes_KDR
    whitened_KND = torch.baddbmm(centred_KND, along_KNR * stretch_KR[:, None], axes_KDR.mT)
    return (whitened_KND * rest_K[:, None, None]).transpose(0, 1)
