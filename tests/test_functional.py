"""The method as pure functions: agreement with the published code's numbers, and what must hold for any
input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from calm_pl import functional as F

ORACLE = sorted((Path(__file__).parent / "data" / "oracle").glob("*.safetensors"))
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def load(path):
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["meta"]), load_file(path)


@pytest.fixture(params=ORACLE, ids=lambda path: path.stem)
def oracle(request):
    return load(request.param)


def ties_at_the_cut(reliability, top_k):
    if top_k is None or top_k >= len(reliability):
        return torch.zeros(reliability.shape[1], dtype=torch.bool)
    ordered = reliability.sort(dim=0, descending=True).values
    return ordered[top_k - 1] == ordered[top_k]


def test_prototypes_and_posteriors_agree_with_the_published_code(oracle):
    meta, t = oracle
    prototypes = F.class_prototypes(t["support"], t["support_labels"], len(t["prototypes"]))
    assert_close(prototypes, t["prototypes"], **TOLERANCE)
    assert_close(F.head_posteriors(t["test"], prototypes, meta["tau"]), t["test_posteriors"], **TOLERANCE)


def test_weights_and_scores_agree_with_the_published_code(oracle):
    meta, t = oracle
    tau = meta["tau"]
    posteriors = F.head_posteriors(t["val"], t["prototypes"], tau)
    counts = torch.bincount(t["val_labels"], minlength=len(t["prototypes"]))
    for case in meta["cases"]:
        key, tau_w, top_k = case["key"], case["tau_w"], case["top_k"]
        if case["scheme"] == "grw":
            reliability = F.global_reliability(posteriors, t["val_labels"])
            assert_close(reliability, t["grw.reliability"], **TOLERANCE)
            weights = F.global_weights(reliability, tau_w, top_k)
            decided = ~ties_at_the_cut(reliability[:, None], top_k)
            assert_close(weights, t[f"{key}.weights"], **TOLERANCE)
            scores = F.vote(t["test"], t["prototypes"], weights[:, None].expand(-1, len(t["prototypes"])), tau)
        else:
            reliability = F.head_reliability(posteriors, t["val_labels"], case["scheme"])
            assert_close(reliability, t[f"{case['scheme']}.reliability"], **TOLERANCE)
            reliability = F.shrink_reliability(reliability, counts, case["alpha"])
            weights = F.head_weights(reliability, case["scheme"], tau_w, top_k)
            scores = F.vote(t["test"], t["prototypes"], weights, tau)
            # Which of several heads of equal reliability makes the cut is arbitrary there, the lower index
            # here.
            decided = ~ties_at_the_cut(reliability, top_k)
            assert decided.sum() >= decided.numel() // 2
            assert_close(weights[:, decided], t[f"{key}.weights"][:, decided], **TOLERANCE)
            assert_close(scores[:, decided], t[f"{key}.scores"][:, decided], **TOLERANCE)
        if decided.all():
            accuracy = (scores.argmax(1) == t["test_labels"]).float().mean().item()
            assert accuracy == pytest.approx(case["accuracy"], abs=1e-6)


def test_sav_agrees_with_the_published_code(oracle):
    _, t = oracle
    num_classes, num_heads, _ = t["prototypes"].shape
    correct = F.sav_head_accuracy(t["support"], t["support_labels"], num_classes)
    assert torch.equal(correct, t["sav.correct_per_head"])
    votes = torch.nn.functional.one_hot(t["sav.head_votes"], num_classes)
    heads = [num_heads - 1, 0, 2]
    assert torch.equal(F.sav_votes(t["test"], t["prototypes"], heads), votes[:, heads].sum(1))


@st.composite
def episodes(draw, min_clips=1):
    """Random heads of a small labelled set in which every class has clips, and a few queries."""
    num_classes, num_heads, width = draw(st.integers(2, 5)), draw(st.integers(1, 6)), draw(st.integers(2, 6))
    counts = draw(st.lists(st.integers(min_clips, 4), min_size=num_classes, max_size=num_classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(num_classes, num_heads, width, generator=generator)
    heads = centres[labels] + torch.randn(len(labels), num_heads, width, generator=generator) + 0.5
    queries = torch.randn(draw(st.integers(1, 7)), num_heads, width, generator=generator)
    return heads, labels, num_classes, queries, generator


taus = st.floats(0.02, 5.0)
schemes = st.sampled_from(F.SCHEMES)


@settings(max_examples=60, deadline=None)
@given(
    episodes(),
    schemes,
    taus,
    st.floats(0.05, 10.0),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(0.0, 20.0),
)
def test_weights_are_distributions_over_heads(episode, scheme, tau, tau_w, top_k, alpha):
    heads, labels, num_classes, _, _ = episode
    reliability = F.head_reliability(F.leave_one_out_posteriors(heads, labels, num_classes, tau), labels, scheme)
    reliability = F.shrink_reliability(reliability, torch.bincount(labels, minlength=num_classes), alpha)
    weights = F.head_weights(reliability, scheme, tau_w, top_k)
    assert (weights >= 0).all()
    assert_close(weights.sum(0), torch.ones(num_classes))
    if top_k is not None:
        assert ((weights > 0).sum(0) <= top_k).all()


@settings(max_examples=40, deadline=None)
@given(episodes(), taus, st.integers(1, 9))
def test_vote_equals_the_materialised_sum_at_any_chunk_size(episode, tau, chunk_size):
    heads, labels, num_classes, queries, generator = episode
    prototypes = F.class_prototypes(heads, labels, num_classes)
    weights = torch.rand(heads.shape[1], num_classes, generator=generator)
    expected = (F.head_posteriors(queries, prototypes, tau) * weights).sum(1)
    assert_close(F.vote(queries, prototypes, weights, tau, chunk_size), expected)
    assert_close(F.vote(queries, prototypes, weights, tau), expected)


class LargestTensor(TorchDispatchMode):
    """Watches how many numbers the largest tensor holds that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= 4 * out.numel():
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vote_never_makes_the_large_tensor_nor_a_copy_of_all_queries(dtype):
    num_clips, num_heads, num_classes, width = 1000, 200, 100, 16
    queries = torch.ones(1, 1, 1, dtype=dtype).expand(num_clips, num_heads, width)
    prototypes = torch.randn(num_classes, num_heads, width, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as seen:
        F.vote(queries, prototypes, torch.full((num_heads, num_classes), 0.1), 0.1)
    assert 0 < seen.numbers < num_clips * num_heads * num_classes / 5
    with LargestTensor() as seen:
        F.vote(queries, prototypes, torch.full((num_heads, num_classes), 0.1), 0.1, chunk_size=2)
    assert seen.numbers <= num_classes * num_heads * width
    assert seen.numbers < num_clips * num_heads * width


@settings(max_examples=40, deadline=None)
@given(episodes(), taus)
def test_leave_one_out_equals_leaving_out_by_hand(episode, tau):
    heads, labels, num_classes, _, _ = episode
    by_hand = []
    for n in range(len(heads)):
        rest = torch.arange(len(heads)) != n
        prototypes = F.class_prototypes(heads[rest], labels[rest], num_classes)
        by_hand.append(F.head_posteriors(heads[n : n + 1], prototypes, tau))
    found = F.leave_one_out_posteriors(heads, labels, num_classes, tau)
    assert_close(found, torch.cat(by_hand), atol=1e-4, rtol=0.0)


@settings(max_examples=30, deadline=None)
@given(episodes(), schemes, taus)
def test_permuting_clips_classes_or_heads_permutes_the_outputs(episode, scheme, tau):
    heads, labels, num_classes, queries, generator = episode

    def run(heads, labels, queries):
        posteriors = F.leave_one_out_posteriors(heads, labels, num_classes, tau)
        weights = F.head_weights(F.head_reliability(posteriors, labels, scheme), scheme)
        return weights, F.vote(queries, F.class_prototypes(heads, labels, num_classes), weights, tau)

    clips = torch.randperm(len(heads), generator=generator)
    classes = torch.randperm(num_classes, generator=generator)
    order = torch.randperm(heads.shape[1], generator=generator)
    turned = torch.randperm(len(queries), generator=generator)
    weights, scores = run(heads, labels, queries)
    new_weights, new_scores = run(heads[clips][:, order], classes[labels[clips]], queries[turned][:, order])
    # A margin of exactly zero may round to either side of it; weights below that resolution are not compared.
    assert_close(new_weights[:, classes], weights[order], atol=1e-3, rtol=1e-3)
    assert_close(new_scores[:, classes], scores[turned], atol=1e-3, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(episodes(min_clips=2), st.sampled_from([torch.float16, torch.bfloat16]), taus)
def test_half_precision_is_computed_in_float32(episode, dtype, tau):
    heads, labels, num_classes, queries, _ = episode
    heads, queries = heads.to(dtype), queries.to(dtype)

    def run(heads, queries):
        prototypes = F.class_prototypes(heads, labels, num_classes)
        posteriors = F.leave_one_out_posteriors(heads, labels, num_classes, tau)
        weights = F.head_weights(F.head_reliability(posteriors, labels, "prob_softmax"), "prob_softmax")
        mean, transform = F.whitening(heads, labels, num_classes, 0.3)
        return (
            prototypes,
            posteriors,
            F.head_posteriors(queries, prototypes, tau),
            F.vote(queries, prototypes, weights, tau),
            F.whiten(queries, mean, transform),
        )

    for half, full in zip(run(heads, queries), run(heads.float(), queries.float()), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_autocast_changes_nothing():
    queries, prototypes = torch.randn(2, 6, 4, 32, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.arange(6) % 2, torch.full((4, 6), 0.25)

    def run():
        metric = F.HeadMetric.estimate(queries, labels, 2)
        return (
            F.head_posteriors(queries, prototypes, 0.1),
            F.leave_one_out_posteriors(queries, labels, 2, 0.1),
            F.cosines(queries, prototypes),
            F.vote(queries, prototypes, weights, 0.1),
            F.whiten(queries, *F.whitening(queries, labels, 2, 0.3)),
            F.whiten_by_factors(queries, metric.mean_KD, *metric.factors(0.3)),
            metric.transform(0.3),
        )

    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for under_autocast, plain in zip(found, run(), strict=True):
        assert torch.equal(under_autocast, plain)


def test_vote_is_differentiable_in_all_of_its_inputs():
    generator = torch.Generator().manual_seed(0)
    queries, prototypes = torch.randn(2, 5, 4, 3, generator=generator)
    inputs = [queries, prototypes[:2], torch.rand(4, 2, generator=generator), torch.tensor([0.1, 0.2, 0.5, 1.0])]

    def materialised(queries, prototypes, weights, tau):
        return (torch.softmax(F.cosines(queries, prototypes) / tau[:, None], -1) * weights).sum(1)

    for needed in (range(4), *([i] for i in range(4))):
        leaves = [tensor.clone().requires_grad_(i in needed) for i, tensor in enumerate(inputs)]
        wanted = [leaves[i] for i in needed]
        expected = torch.autograd.grad(materialised(*leaves).square().sum(), wanted)
        found = torch.autograd.grad(F.vote(*leaves, chunk_size=2).square().sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_whole_numbers_of_any_size_are_labels_or_indices():
    labels = LABELS.int()
    assert torch.equal(
        F.leave_one_out_posteriors(HEADS, labels, 2, 0.1), F.leave_one_out_posteriors(HEADS, LABELS, 2, 0.1)
    )
    for scheme in F.SCHEMES:
        found = F.head_reliability(POSTERIORS, labels, scheme)
        assert torch.equal(found, F.head_reliability(POSTERIORS, LABELS, scheme))
    assert torch.equal(F.global_reliability(POSTERIORS, labels), F.global_reliability(POSTERIORS, LABELS))
    assert torch.equal(F.whitening(HEADS, labels, 2, 0.3)[1], F.whitening(HEADS, LABELS, 2, 0.3)[1])
    assert torch.equal(F.sav_head_accuracy(HEADS, labels, 2), F.sav_head_accuracy(HEADS, LABELS, 2))
    byte_indices = torch.tensor([2, 0], dtype=torch.uint8)
    assert torch.equal(F.sav_votes(HEADS, PROTOTYPES, byte_indices), F.sav_votes(HEADS, PROTOTYPES, [2, 0]))


def test_heads_of_any_size_that_is_not_refused_give_the_same_cosines():
    plain = F.leave_one_out_posteriors(HEADS, LABELS, 2, 0.1)
    assert_close(F.leave_one_out_posteriors(HEADS * 2.0**47, LABELS, 2, 0.1), plain)  # 1e14
    mean, transform = F.whitening(HEADS * 2.0**47, LABELS, 2, 0.3)
    expected = F.whiten(HEADS, *F.whitening(HEADS, LABELS, 2, 0.3))
    assert_close(F.whiten(HEADS * 2.0**47, mean, transform), expected, atol=1e-4, rtol=1e-4)


def test_ties_break_by_the_lower_index():
    reliability = torch.tensor([[0.5], [0.9], [0.5], [0.9], [0.9]])
    assert F.head_weights(reliability, "margin_softmax", top_k=2).nonzero()[:, 0].tolist() == [1, 3]
    assert F.head_weights(torch.zeros(5, 1), "margin_clamped", top_k=2)[:, 0].tolist() == [0.5, 0.5, 0, 0, 0]
    assert F.head_weights(torch.zeros(500, 1), "margin_clamped", top_k=100)[:, 0].nonzero().max() == 99
    same = torch.ones(3, 1, 2)
    assert F.sav_votes(torch.ones(1, 1, 2), same, [0]).tolist() == [[1, 0, 0]]


def test_labels_of_minus_one_are_ignored():
    posteriors = torch.softmax(torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)), -1)
    labels = torch.tensor([0, 1, -1, 2, -1, 0])
    kept = labels >= 0
    for scheme in F.SCHEMES:
        expected = F.head_reliability(posteriors[kept], labels[kept], scheme)
        assert torch.equal(F.head_reliability(posteriors, labels, scheme), expected)
        assert torch.equal(expected[:, 3], torch.zeros(3))
    assert torch.equal(F.global_reliability(posteriors, labels), F.global_reliability(posteriors[kept], labels[kept]))
    assert torch.equal(F.global_reliability(posteriors, torch.full((6,), -1)), torch.zeros(3))


@settings(max_examples=30, deadline=None)
@given(episodes(min_clips=2), st.floats(0.05, 0.95))
def test_whitening_is_the_inverse_root_of_the_shrunk_covariance(episode, shrinkage):
    heads, labels, num_classes, queries, _ = episode
    mean, transform = F.whitening(heads, labels, num_classes, shrinkage)
    prototypes = F.class_prototypes(heads, labels, num_classes)
    assert_close(mean, prototypes.mean(0))
    for k in range(heads.shape[1]):
        residuals = (heads - prototypes[labels])[:, k].double()
        covariance = residuals.T @ residuals / (len(heads) - num_classes)
        identity = torch.eye(len(covariance), dtype=torch.float64)
        metric = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / len(covariance) * identity
        inverse = transform[k].double() @ transform[k].double()
        assert_close(inverse @ metric, identity, atol=1e-3, rtol=0.0)
        expected = (queries[:, k] - mean[k]) @ transform[k]
        assert_close(F.whiten(queries, mean, transform)[:, k], expected, atol=1e-4, rtol=1e-4)


def test_whitening_ignores_padding():
    generator = torch.Generator().manual_seed(3)
    heads, labels = torch.randn(12, 2, 5, generator=generator), torch.arange(12) % 3
    padded = torch.cat([heads, torch.zeros(12, 2, 3)], dim=-1)
    plain = F.whiten(heads, *F.whitening(heads, labels, 3, 0.4))
    found = F.whiten(padded, *F.whitening(padded, labels, 3, 0.4))
    assert_close(found[..., :5], plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[..., 5:], torch.zeros(12, 2, 3))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_whitening_of_single_clips_is_centred_cosine(shrinkage):
    heads, labels = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    mean, transform = F.whitening(heads, labels, 4, shrinkage)
    whitened = F.whiten(heads, mean, transform)
    assert_close(F.cosines(whitened, whitened), F.cosines(heads - heads.mean(0), heads - heads.mean(0)))


def test_whitening_survives_a_singular_covariance_without_shrinkage():
    heads, labels = (
        torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 1, 1, 1]),
    )
    assert F.whiten(heads, *F.whitening(heads, labels, 2, 0.0)).isfinite().all()


HEADS, LABELS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 0, 1])
PROTOTYPES, WEIGHTS = HEADS[:2], torch.full((3, 2), 1 / 3)
POSTERIORS = torch.full((4, 3, 2), 0.5)
NAN = torch.full_like(HEADS, torch.nan)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: F.class_prototypes(HEADS[0], LABELS, 2), "heads_NKD"),
        (lambda: F.class_prototypes(NAN, LABELS, 2), "heads_NKD"),
        (lambda: F.class_prototypes(HEADS[:, :0], LABELS, 2), "heads_NKD"),
        (lambda: F.class_prototypes(HEADS.long(), LABELS, 2), "heads_NKD"),
        (lambda: F.class_prototypes(HEADS.tolist(), LABELS, 2), "heads_NKD: a tensor is needed; got list"),
        (lambda: F.class_prototypes(HEADS.double() * 1e39, LABELS, 2), "heads_NKD"),
        (lambda: F.class_prototypes(HEADS, LABELS[:3], 2), "labels_N"),
        (lambda: F.class_prototypes(HEADS, LABELS.tolist(), 2), "labels_N: a tensor is needed; got list"),
        (lambda: F.class_prototypes(HEADS, LABELS.numpy(), 2), "labels_N: a tensor is needed; got ndarray"),
        (lambda: F.class_prototypes(HEADS, LABELS.float(), 2), "labels_N"),
        (lambda: F.class_prototypes(HEADS, LABELS - 1, 2), "labels_N"),
        (lambda: F.class_prototypes(HEADS, LABELS + 1, 2), "labels_N"),
        (lambda: F.class_prototypes(HEADS, LABELS, 0), "num_classes"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES, 0.0), "tau"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES, float("nan")), "tau"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES, float("inf")), "tau"),
        (lambda: F.head_posteriors(NAN, PROTOTYPES, 1.0), "queries_NKD"),
        (lambda: F.head_posteriors(HEADS * 1e19, PROTOTYPES, 1.0), "queries_NKD holds .* beyond 1e"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES * 1e19, 1.0), "prototypes_CKD holds .* beyond 1e"),
        (lambda: F.head_posteriors(HEADS, NAN, 1.0), "prototypes_CKD"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES[:0], 1.0), "prototypes_CKD"),
        (lambda: F.head_posteriors(HEADS, PROTOTYPES[:, :2], 1.0), "prototypes_CKD"),
        (lambda: F.leave_one_out_posteriors(HEADS, LABELS, 2, -1.0), "tau"),
        (lambda: F.leave_one_out_posteriors(HEADS, LABELS, 1, 1.0), "labels_N"),
        (lambda: F.head_reliability(POSTERIORS, LABELS, "median"), "scheme"),
        (lambda: F.head_reliability(POSTERIORS, LABELS - 2, "prob_softmax"), "labels_N"),
        (lambda: F.head_reliability(POSTERIORS[0], LABELS, "prob_softmax"), "posteriors_NKC"),
        (lambda: F.global_reliability(POSTERIORS, LABELS + 1), "labels_N"),
        (lambda: F.shrink_reliability(WEIGHTS, LABELS, 1.0), "counts_C"),
        (lambda: F.shrink_reliability(WEIGHTS, [2, 2], 1.0), "counts_C"),
        (lambda: F.shrink_reliability(WEIGHTS, LABELS[:2], float("nan")), "alpha"),
        (lambda: F.head_weights(WEIGHTS, "margins"), "scheme"),
        (lambda: F.head_weights(WEIGHTS * torch.nan, "prob_softmax"), "reliability_KC"),
        (lambda: F.head_weights(WEIGHTS, "prob_softmax", 0.0), "tau_w"),
        (lambda: F.head_weights(WEIGHTS, "prob_softmax", 1.0, 0), "top_k"),
        (lambda: F.global_weights(WEIGHTS), "reliability_K"),
        (lambda: F.vote(HEADS, PROTOTYPES, WEIGHTS.T, 1.0), "weights_KC"),
        (lambda: F.vote(HEADS, PROTOTYPES, WEIGHTS * torch.inf, 1.0), "weights_KC"),
        (lambda: F.vote(HEADS, PROTOTYPES, WEIGHTS, 0.0), "tau"),
        (lambda: F.vote(HEADS, PROTOTYPES, WEIGHTS, 1.0, chunk_size=0), "chunk_size"),
        (lambda: F.whitening(HEADS * 1e19, LABELS, 2, 0.3), "heads_NKD"),
        (lambda: F.whitening(HEADS[:0], LABELS[:0], 2, 0.3), "heads_NKD holds no clip"),
        (lambda: F.whitening(HEADS, LABELS, 2, 1.5), "shrinkage"),
        (lambda: F.whitening(HEADS, LABELS, 2, float("nan")), "shrinkage"),
        (lambda: F.whiten(NAN, HEADS[0], torch.eye(5).expand(3, 5, 5)), "heads_NKD"),
        (lambda: F.whiten(HEADS, HEADS[0, :2], torch.eye(5).expand(3, 5, 5)), "mean_KD"),
        (lambda: F.whiten(HEADS, HEADS[0], torch.eye(4).expand(3, 4, 4)), "transform_KDD"),
        (lambda: F.sav_votes(HEADS, PROTOTYPES, [3]), "head_indices"),
        (lambda: F.sav_votes(HEADS, PROTOTYPES, []), "head_indices is empty"),
        (lambda: F.sav_votes(HEADS, PROTOTYPES, torch.tensor([True, False, True])), "head_indices"),
        (lambda: F.sav_votes(HEADS, PROTOTYPES, [0.5]), "head_indices"),
        (lambda: F.sav_head_accuracy(HEADS, LABELS, 1), "labels_N"),
    ],
)
def test_inputs_that_make_no_sense_name_the_argument(call, argument):
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        call()
