"""Class-conditional head weights that are optimised on few-shot episodes of the support set.

Shapes: N clips, K heads, D head dimension, C classes, R rank, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import Self

from calm_pl import functional as F
from calm_pl.methods.base import check_support
from calm_pl.methods.base_weights import base_weights
from calm_pl.methods.calibration import MIN_PROBABILITY, calibrate, temper
from calm_pl.methods.episodes import EpisodeSource
from calm_pl.methods.hearing import Hearing
from calm_pl.methods.leave_one_out import LeaveOneOut
from calm_pl.methods.metric_space import MetricSpace, directions
from calm_pl.methods.selection import judged_clips
from calm_pl.methods.settings import ONE_SHOT, SEARCH, OneShot, Search
from calm_pl.methods.shared_start import choose_start, shared_weights
from calm_pl.methods.trust import Folds, Trust, choose, cross_validate, mixture_log_likelihood
from calm_pl.methods.weighting import entmax, entmax_logits, penalty, step_size

PARAMETERS = ("moves_KC", "head_moves_KR", "class_moves_RC", "log_tau", "bias_C")


class LearnedWeights(MetricSpace):
    """CALM with learned weights: w = entmax over heads of logits[k,c], in the metric that the support set chooses.

    The score is CALM's, s[n,c] = sum over k of w[k,c] p[n,k,c]. The logits start at leave-one-out formula
    weights that all classes share; how far they may move from there, and from one another, is itself
    cross-validated, and where moving does not clearly help the start stays. Where no class has two clips
    nothing can be left out, and the start has default settings.

    `start` chooses, calibrates and creates the parameters, `training_loss` is one step's loss, `finish` lets go of the
    support set; `fit` does all three with a plain loop. Parameters: `moves_KC` (logits relative to the start, in units
    of about one e-fold of a weight) or its factors `head_moves_KR`, `class_moves_RC`; with the options, `log_tau`
    (scalar or K) and `bias_C`. All else is a buffer.

    Args:
        alpha: of entmax; 1.0 dense weights, 1.5 sparse, 2.0 the sparsest.
        temperature: "fixed" keeps the chosen tau; "global" learns one; "per_head" one a head, for many clips
            a class.
        class_bias: learn a log-score offset per class, for support sets that mirror class frequencies.
        rank: factors of the moves instead of all K x C, for hundreds of classes.
        to_start: penalty toward the formula's weights, in clips; None is cross-validated.
        to_shared: penalty toward weights shared by all classes, in clips; None is cross-validated.
        steps: optimiser steps; None is cross-validated.
        standard_errors: how clearly learning must do better in cross-validation, else the start stays.
        lr: Adam's step size; None is cross-validated.
        head_dropout: share of heads left out at every step, against reliance on single heads.
        label_smoothing: of the cross-entropy, for support labels that may be wrong.
        averaging: decay of a running average of the parameters that replaces them at the end; 0 for none.
        base: run folders of fits on other labelled sets with the same backbone: the heads trusted there are trusted
            here from the start. Often much at 1 shot, nothing from about 5 on.
        base_clips: how many clips of this support set the base's word is worth.
        shrinkage: g of the within-head metric, a number or "ledoit_wolf" or "oas"; None is chosen.
        centre: of the within-head metric, as a share of the mean of the prototypes; None is chosen.
        metric_rank: of the within-head metric, at most, for a small classifier: beyond it, a head's variation counts as
            the same in every direction. None for all that the clips tell.
        tau: temperature of the posteriors of all heads; None is chosen, and heads of wide spread vote more softly.
        heard_spread: how far the prototypes of one clip must lie apart for a head to be heard (`hearing`); of n clips
            an n-th part of it.
        tau_of_spread: no head's tau is less than this times its squared spread.
        evidence: what a clip left out counts for when g, centre, tau and the sharpness of the start are averaged. Less
            than a whole clip: each stands in the prototypes that judge the others, so that they err together.
        shots: prototypes from this many random clips in an episode; None for leave-one-out episodes.
        episodes: random episodes a step (with `shots`).
        seed: of the episodes.
        search: what is tried for whatever is chosen.
        one_shot: what is used where no class has two clips.
    """

    start_logits_KC: Tensor
    tau_K: Tensor
    averages: dict[str, Tensor]

    def __init__(
        self,
        alpha: float = 1.5,
        temperature: str = "fixed",
        class_bias: bool = False,
        rank: int | None = None,
        to_start: float | None = None,
        to_shared: float | None = None,
        steps: int | None = None,
        standard_errors: float = 1.0,
        lr: float | None = None,
        head_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        averaging: float = 0.0,
        base: Sequence[str] = (),
        base_clips: float = 50.0,
        shrinkage: float | str | None = None,
        centre: float | None = None,
        metric_rank: int | None = None,
        tau: float | None = None,
        heard_spread: float = 0.11,
        tau_of_spread: float = 1.0,
        evidence: float = 0.5,
        shots: int | None = None,
        episodes: int = 4,
        seed: int = 0,
        search: Search = SEARCH,
        one_shot: OneShot = ONE_SHOT,
    ) -> None:
        super().__init__()
        if alpha not in (1.0, 1.5, 2.0):
            raise ValueError(f"alpha must be 1.0, 1.5 or 2.0; got {alpha}")
        if temperature not in ("fixed", "global", "per_head"):
            raise ValueError(f"temperature must be fixed, global or per_head; got {temperature!r}")
        if rank is not None and rank < 1:
            raise ValueError(
                f"rank must be at least 1, or None for a weight of its own for each head and class; got {rank}"
            )
        self.alpha, self.temperature, self.class_bias, self.rank = alpha, temperature, class_bias, rank
        self.to_start, self.to_shared, self.steps, self.lr = to_start, to_shared, steps, lr
        self.standard_errors = standard_errors
        self.head_dropout, self.label_smoothing, self.averaging = head_dropout, label_smoothing, averaging
        self.base, self.base_clips = tuple(base), base_clips
        self.shrinkage, self.centre, self.metric_rank = shrinkage, centre, metric_rank
        self.heard_spread, self.tau_of_spread = heard_spread, tau_of_spread
        self.tau, self.evidence = tau, evidence
        self.shots, self.episodes, self.seed = shots, episodes, seed
        self.search, self.one_shot = search, one_shot
        self.trust = Trust()
        self.averages = {}
        self.source: EpisodeSource | None = None

    def fit(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        self.start(heads_NKD, labels_N, num_classes)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        with torch.enable_grad():
            for step in range(self.num_steps):
                optimizer.zero_grad()
                self.training_loss(step).backward()
                optimizer.step()
                self.after_step()
        return self.finish()

    @property
    def num_steps(self) -> int:
        """Optimiser steps that the support set asked for, or the caller; none where no class has two clips."""
        return self.trust.steps

    @property
    def learning_rate(self) -> float:
        """Adam's, that the support set asked for, or the caller."""
        return self.trust.lr if self.lr is None else self.lr

    def start(self, heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        """Choose metric, temperature and trust on the support set, and put the parameters at their start."""
        labels_N = check_support(heads_NKD, labels_N, num_classes)
        heads_NKD = directions(heads_NKD)
        prototypes_CKD = F.class_prototypes(heads_NKD, labels_N, num_classes)
        metric, shrinkage = self.estimate(heads_NKD, labels_N, num_classes, self.one_shot.centre)
        clips = judged_clips(labels_N, heads_NKD.shape[1] * num_classes)
        hearing = self._hearing(prototypes_CKD, len(labels_N) if len(clips) else None)
        left_out = LeaveOneOut(heads_NKD, labels_N, num_classes, metric)
        if len(clips):
            choices = choose_start(left_out, clips, hearing, self.search, self._given(), self.evidence)
        else:
            choices = self._default_start(metric.centre, shrinkage)
        tau_K, heard_K = hearing.tau(choices["tau"]), hearing.heard_K
        left_out = left_out.around(choices["centre"])
        shrinkage, power = choices["shrinkage"], choices["tau_w"]
        base_K1 = base_weights(self.base, heads_NKD.shape[1]).to(labels_N.device)[:, None] if self.base else None

        def with_base(weights_KC: Tensor, count: int) -> Tensor:
            if base_K1 is None:
                return weights_KC
            return (count * weights_KC + self.base_clips * base_K1) / (count + self.base_clips)

        def start_weights(posteriors_NKC: Tensor, labels_N: Tensor) -> Tensor:
            return with_base(shared_weights(posteriors_NKC, labels_N, heard_K, power), len(labels_N))

        if len(clips):
            folds = Folds.of(left_out, clips, shrinkage, tau_K)
            weights_KC = start_weights(folds.posteriors_NKC, folds.labels_N)
            choices |= self._choose_trust(folds, start_weights)
        else:
            alike_KC = F.head_weights(heard_K[:, None], "margin_clamped").expand(-1, num_classes)
            weights_KC = with_base(alike_KC, len(labels_N))
            choices |= {**asdict(Trust()), "calibration": {"temperature": 1.0}}
        self.keep(
            {"alpha": self.alpha, **choices},
            start_logits_KC=entmax_logits(weights_KC, self.alpha),
            tau_K=tau_K,
            **self.in_metric(metric.around(choices["centre"]), shrinkage, self.metric_rank, prototypes_CKD),
        )
        self._make_parameters(self.start_logits_KC)
        self._take_up(left_out if len(clips) else None)
        return self

    def started_as(self, state: dict[str, Tensor], heads_NKD: Tensor, labels_N: Tensor, num_classes: int) -> Self:
        """Be where another `start` on this support set was, of which this is the state dict: another process's, which
        may have chosen otherwise for the last bit of a sum."""
        self.load_state_dict(state)
        heads_NKD, choices = directions(heads_NKD), self.choices()
        metric, _ = self.estimate(heads_NKD, labels_N, num_classes, choices["centre"])
        chosen = bool((torch.bincount(labels_N) > 1).any())
        self._take_up(LeaveOneOut(heads_NKD, labels_N, num_classes, metric) if chosen else None)
        return self

    def _take_up(self, left_out: LeaveOneOut | None) -> None:
        """Get ready to learn as was chosen, on these clips."""
        choices = self.choices()
        self.trust = Trust(**{field.name: choices[field.name] for field in fields(Trust)})
        self.source, self.averages = None, {}
        if left_out is not None:
            shrinkage, drawn = choices["shrinkage"], (self.shots, self.episodes, self.head_dropout, self.seed)
            self.source = EpisodeSource(left_out, shrinkage, *drawn)

    def _default_start(self, centre: float, shrinkage: float | str) -> dict[str, Any]:
        return {"centre": centre, "shrinkage": shrinkage, "tau": self.one_shot.tau, "tau_w": 1.0, **self._given()}

    def _given(self) -> dict[str, float | str]:
        given = {"centre": self.centre, "shrinkage": self.shrinkage, "tau": self.tau}
        return {name: value for name, value in given.items() if value is not None}

    def _hearing(self, prototypes_CKD: Tensor, num_clips: int | None) -> Hearing:
        """What each head hears by prototypes of so many clips in all; None where no clip can be left out."""
        if num_clips is None:
            hearing = Hearing.of(prototypes_CKD, self.one_shot.heard_spread, self.one_shot.tau_of_spread)
        else:
            enough = self.heard_spread * len(prototypes_CKD) / num_clips
            hearing = Hearing.of(prototypes_CKD, enough, self.tau_of_spread)
        if self.tau is None:
            return hearing
        return replace(hearing, least_tau_K=torch.zeros_like(hearing.least_tau_K))  # the caller's tau holds for all

    def _choose_trust(self, folds: Folds, start: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any]:
        """How far to move from the start, cross-validated for all settings at once."""
        settings = [
            (
                self.to_start if self.to_start is not None else a,
                self.to_shared if self.to_shared is not None else b,
            )
            for a, b in self.search.penalties
        ]
        steps = self.search.steps if self.steps is None else (self.steps,)
        lrs = self.search.lr if self.lr is None else (self.lr,)
        tried = cross_validate(folds, start, list(dict.fromkeys(settings)), steps, lrs, self.alpha)
        if self.steps is not None:
            tried = [one for one in tried if one.trust.steps == self.steps]
        chosen = choose(tried, self.standard_errors)
        _, calibration = calibrate(chosen.scores_NC, chosen.labels_N)
        return {**chosen.as_dict(), "tried": len(tried), "calibration": calibration}

    def _make_parameters(self, start_KC: Tensor) -> None:
        (num_heads, num_classes), device = start_KC.shape, start_KC.device
        shapes: dict[str, Sequence[int]] = {"moves_KC": (num_heads, num_classes)}
        if self.rank is not None:
            shapes = {"head_moves_KR": (num_heads, self.rank), "class_moves_RC": (self.rank, num_classes)}
        for name in PARAMETERS:
            self._parameters.pop(name, None)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, device=device)))
        if self.rank is not None:
            # One factor must not be zero, or neither would ever move; the first one is shared by all classes.
            generator = torch.Generator().manual_seed(self.seed)
            factors_RC = torch.randn(self.rank, num_classes, generator=generator)
            factors_RC[0] = 1
            self.get_parameter("class_moves_RC").data.copy_(factors_RC)
        if self.temperature != "fixed":
            tau = self.tau_K if self.temperature == "per_head" else self.tau_K.mean()
            self.register_parameter("log_tau", nn.Parameter(tau.log()))
        if self.class_bias:
            self.register_parameter("bias_C", nn.Parameter(torch.zeros(num_classes, device=device)))

    def weights(self) -> Tensor:
        """Class-conditional weights (K, C): columns sum to 1, with exact zeros for alpha above 1."""
        alpha = float(self.choices()["alpha"])
        if "moves_KC" in self._parameters:
            moves_KC: Tensor = self.get_parameter("moves_KC")
        else:
            moves_KC = self.get_parameter("head_moves_KR") @ self.get_parameter("class_moves_RC")
        return entmax(self.start_logits_KC + step_size(len(moves_KC), alpha) * moves_KC, alpha)

    def _tau(self) -> Tensor:
        """One temperature a head, (K,)."""
        if "log_tau" not in self._parameters:
            return self.tau_K
        return self.get_parameter("log_tau").exp().reshape(-1).expand(len(self.start_logits_KC))

    def _sharpened(self, cosines_QKC: Tensor) -> Tensor:
        return cosines_QKC / self._tau()[:, None]

    def training_loss(self, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Loss of one step's episodes, or of this rank's part of them.

        The parts of all ranks average to the loss that one process has, and so do their gradients.
        """
        if self.source is None:
            return sum((p.sum() * 0 for p in self.parameters()), torch.zeros(()))
        episodes = self.source.draw(step, rank, world_size)
        weights_KC = self.weights()
        kept_KC = weights_KC.masked_fill(episodes.dropped_K[:, None], 0)
        posteriors_QKC = torch.softmax(self._sharpened(episodes.cosines_QKC), -1)
        logs_QC = self._log_scores(torch.einsum("qkc,kc->qc", posteriors_QKC, kept_KC))
        losses = cross_entropy(logs_QC, episodes.labels_Q, reduction="sum", label_smoothing=self.label_smoothing)
        alpha = float(self.choices()["alpha"])
        held_back = penalty(weights_KC, entmax(self.start_logits_KC, alpha), self.trust.to_start, self.trust.to_shared)
        return losses * world_size / episodes.total + held_back / len(self.source.labels_N)

    def _log_scores(self, scores_QC: Tensor) -> Tensor:
        logs_QC = scores_QC.clamp_min(MIN_PROBABILITY).log()
        return logs_QC + self.get_parameter("bias_C") if "bias_C" in self._parameters else logs_QC

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the parameters into their running average, where one is kept."""
        if self.averaging:
            for name, parameter in self.named_parameters():
                before = self.averages.get(name, parameter.detach())
                before = before.to(parameter.device)  # that of a checkpoint is on the CPU
                self.averages[name] = before.lerp(parameter.detach(), 1 - self.averaging)

    @torch.no_grad()
    def criterion(self) -> Tensor:
        """Mean negative log-likelihood of the support clips left out, without dropout: for stopping and
        checkpoints."""
        if self.source is None:
            return self.start_logits_KC.new_zeros(())
        episodes = self.source.draw(0)
        posteriors_QKC = torch.softmax(self._sharpened(episodes.cosines_QKC), -1)
        scores_QC = self._log_scores(torch.einsum("qkc,kc->qc", posteriors_QKC, self.weights())).exp()
        return -mixture_log_likelihood(scores_QC, episodes.labels_Q).mean()

    @torch.no_grad()
    def finish(self) -> Self:
        """Put the averages in place and let go of the support set."""
        for name, average in self.averages.items():
            self.get_parameter(name).copy_(average)
        self.averages, self.source = {}, None
        weights_KC = self.weights()
        self.keep({**self.choices(), "heads_per_class": float((weights_KC > 0).sum(0).float().mean())})
        return self

    @torch.no_grad()
    def forward(self, queries_NKD: Tensor) -> Tensor:
        """Calibrated class probabilities (N, C)."""
        scores_NC = self.vote(queries_NKD, self.weights(), self._tau())
        logs_NC = self._log_scores(scores_NC)
        return temper(logs_NC.exp(), self.choices()["calibration"]["temperature"])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in PARAMETERS:
            self._parameters.pop(name, None)
            if prefix + name in state_dict:
                self.register_parameter(name, nn.Parameter(torch.empty_like(state_dict[prefix + name])))
        super()._load_from_state_dict(state_dict, prefix, *args)
