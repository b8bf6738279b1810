"""Every method fits, predicts, and comes back from its state dict alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from calm_pl import functional as F
from calm_pl.baselines import GRW, SAV, KNearest, LinearProbe, MeanOfHeads, NearestPrototype
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.logistic import FOLDS, PENALTIES, logistic, stratified_folds

METHODS = {
    "sav": lambda: SAV(num_heads=3),
    "grw": lambda: GRW(top_k=3),
    "linear_probe": LinearProbe,
    "nearest_prototype": lambda: NearestPrototype(num_heads=2),
    "mean_of_heads": MeanOfHeads,
    "k_nearest": lambda: KNearest(k=3),
    "calm": Calm,
    "calm_whitened": lambda: Calm(metric="whitened"),
    "calm_learned": LearnedWeights,
    "calm_learned_rank": lambda: LearnedWeights(rank=2, steps=5, temperature="per_head", class_bias=True),
}


def make_set(shots, num_classes=4, num_heads=6, width=8, seed=0, noise=0.7):
    """Heads of which the even ones tell the classes apart, with a large direction shared by all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(shots)
    centres = torch.randn(num_classes, num_heads, width, generator=torch.Generator().manual_seed(1))
    centres[:, 1::2] = 0
    return centres[labels] + 3 + noise * torch.randn(len(labels), num_heads, width, generator=generator), labels


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shots", [1, 2, 6])
def test_methods_learn_and_predict_probabilities(name, shots):
    heads, labels = make_set(shots)
    queries, truth = make_set(10, seed=5)
    method = METHODS[name]().fit(heads, labels, 4)
    probabilities = method(queries)
    assert probabilities.shape == (len(queries), 4)
    assert probabilities.dtype == torch.float32
    assert_close(probabilities.sum(1), torch.ones(len(queries)))
    if shots == 6:
        assert (probabilities.argmax(1) == truth).float().mean() > 0.6


@pytest.mark.parametrize("name", METHODS)
def test_methods_come_back_from_a_safetensors_file(name, tmp_path):
    heads, labels = make_set(4)
    method = METHODS[name]().fit(heads, labels, 4)
    save_file(method.state_dict(), str(tmp_path / "m.safetensors"))
    fresh = type(method)()  # with no settings given
    fresh.load_state_dict(load_file(str(tmp_path / "m.safetensors")))
    assert torch.equal(fresh(heads), method(heads))
    assert fresh.choices() == method.choices()


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_deterministic_and_leave_their_inputs_alone(name):
    heads, labels = make_set(3)
    before = heads.clone()
    first, second = (METHODS[name]().fit(heads, labels, 4) for _ in range(2))
    assert torch.equal(first(heads), second(heads))
    assert torch.equal(heads, before)


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_a_class_without_clips(name):
    heads, labels = make_set(3)
    with pytest.raises(ValueError, match="labels_N has no clip of class 4"):
        METHODS[name]().fit(heads, labels, 5)
    with pytest.raises(ValueError, match="labels_N must be from 0 to 3; got -1 to 2"):
        METHODS[name]().fit(heads, labels - 1, 4)


def test_baselines_are_their_formulas():
    heads, labels = make_set(5, noise=2.0)
    queries, _ = make_set(3, seed=5, noise=2.0)
    prototypes = F.class_prototypes(heads, labels, 4)

    grw = GRW(tau=0.2, tau_w=0.3, top_k=2).fit(heads, labels, 4)
    reliability_K = F.global_reliability(F.head_posteriors(heads, prototypes, 0.2), labels)
    weights_K = F.global_weights(reliability_K, 0.3, 2)
    posteriors_NKC = F.head_posteriors(queries, prototypes, 0.2)
    assert_close(grw(queries), (posteriors_NKC * weights_K[:, None]).sum(1))
    assert_close(MeanOfHeads(tau=0.2).fit(heads, labels, 4)(queries), posteriors_NKC.mean(1))

    sav = SAV(num_heads=1).fit(heads, labels, 4)
    best = int((F.nearest_prototypes(heads, prototypes) == labels[:, None]).sum(0).argmax())
    assert torch.equal(sav(queries), torch.eye(4)[F.nearest_prototypes(queries, prototypes)[:, best]])

    nearest = NearestPrototype(num_heads=2, tau=0.3).fit(heads, labels, 4)
    last_N1F, last_CF = queries[:, None, -2:].flatten(2), prototypes[:, -2:].flatten(1)
    assert_close(nearest(queries), torch.softmax(torch.cosine_similarity(last_N1F, last_CF, dim=-1) / 0.3, 1))

    k_nearest = KNearest(k=3, tau=0.3).fit(heads, labels, 4)
    centred, centred_queries = heads - heads.mean(0), queries - heads.mean(0)
    cosines_NM = torch.cosine_similarity(centred_queries[:, None], centred, dim=-1).mean(-1)
    for cosines_M, found_C in zip(cosines_NM, k_nearest(queries), strict=True):
        votes_C = torch.zeros(4)
        for n in cosines_M.argsort(descending=True)[:3]:
            votes_C[labels[n]] += torch.exp(cosines_M[n] / 0.3)
        assert_close(found_C, votes_C / votes_C.sum())


def test_sav_uses_the_heads_that_classify_best():
    heads, labels = make_set(20, noise=0.3)
    assert set(SAV(num_heads=3).fit(heads, labels, 4).choices()["head_indices"]) == {0, 2, 4}


def test_logistic_regression_reaches_the_optimum():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 5, generator=generator), torch.arange(30) % 3
    weights, bias = logistic(features, labels, 3, c=0.5)
    weights, bias = weights.requires_grad_(), bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weights + bias, labels)
    (loss + weights.square().sum() / (2 * 0.5 * 30)).backward()
    assert weights.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


def logistic_choice(heads, labels, c):
    """(accuracy, minus NLL, c) of clips held out, the long way: on all features instead of principal axes."""
    features_NF, num_classes = LinearProbe._features(heads, heads.mean(0)), int(labels.max()) + 1
    fold_N = stratified_folds(labels, FOLDS)
    logits_NC = torch.zeros(len(labels), num_classes)
    for fold in range(FOLDS):
        held = fold_N == fold
        weights_FC, bias_C = logistic(features_NF[~held], labels[~held], num_classes, c)
        logits_NC[held] = features_NF[held] @ weights_FC + bias_C
    tested_NC, truth_N = logits_NC[fold_N >= 0], labels[fold_N >= 0]
    accuracy = float((tested_NC.argmax(1) == truth_N).float().mean())
    return accuracy, -float(torch.nn.functional.cross_entropy(tested_NC, truth_N)), c


def test_linear_probe_chooses_its_penalty_by_cross_validation():
    heads, labels = make_set(5, noise=2.0)
    heads, labels = torch.cat([heads, heads[:1] + 1]), torch.cat([labels, torch.tensor([4])])  # alone in its class
    choices = LinearProbe().fit(heads, labels, 5).choices()
    accuracy, log_likelihood, c = max(logistic_choice(heads, labels, c) for c in PENALTIES)
    assert choices == {"accuracy": accuracy, "nll": pytest.approx(-log_likelihood, rel=1e-3), "c": c}
    assert LinearProbe(c=3.0).fit(heads, labels, 5).choices()["c"] == 3.0


def test_folds_are_stratified_and_a_lone_clip_is_never_tested():
    fold = stratified_folds(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 2)
    assert fold.tolist() == [0, 1, 0, 1, 0, 1, -1]
