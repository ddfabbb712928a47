"""Hutchinson's diagonal: unbiased with its signs, with the variance of its probes, one mean over batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import AdaHessianDiagonal, HutchinsonDiagonal, LossGraph, Observation, estimate
from curvature.probes import probe
from tests.curvature import dense
from tests.curvature.cases import N, X, Y, mlp, reals, seeded

SIZE = 31


def exact() -> Tensor:
    model = mlp()
    return dense.hessian(F.cross_entropy(model(X), Y), dense.trainable(model))


def estimated(**options: object) -> Tensor:
    model = mlp()
    return dense.flat(estimate(HutchinsonDiagonal(**options), model, F.cross_entropy, [(X, Y)]).diagonal())  # type: ignore[arg-type]


def deviation(H: Tensor, distribution: str) -> Tensor:
    """The standard deviation of one probe's entries: Σ_{j≠i} H_ij², and 2 H_ii² more with Gaussian probes."""
    off = (H - H.diagonal().diag()).square().sum(1)
    return (off + (2 * H.diagonal().square() if distribution == "gaussian" else 0)).sqrt()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_it_is_unbiased_and_signs_survive(distribution: str) -> None:
    # 2,000 probes, seed 0; each of 31 entries within 4.5 of its own standard errors.
    H = exact()
    K = 2000
    found = estimated(probes=K, distribution=distribution)
    errors = (found - H.diagonal()) / (deviation(H, distribution) / K**0.5)
    assert float(errors.abs().max()) < 4.5
    assert float(errors.square().mean()) == pytest.approx(
        1.0, abs=0.9
    )  # neither biased nor of another variance
    clear = H.diagonal().abs() > 5 * deviation(H, distribution) / K**0.5
    assert bool((H.diagonal()[clear] < 0).any()), "the case must be indefinite"
    assert torch.equal(found.sign()[clear], H.diagonal().sign()[clear])


def test_absolute_values_taken_probe_by_probe_are_biased() -> None:
    # Why |·| comes last: the mean of |z ⊙ Hz| over 2,000 probes is far above |diag(H)|.
    H = exact()
    draws = torch.stack(
        [(z := dense.flat(probe(dense.trainable(mlp()), 0, k))) * (H @ z) for k in range(2000)]
    )
    last, first = draws.mean(0).abs(), draws.abs().mean(0)
    assert float((last - H.diagonal().abs()).abs().max()) < 0.1 * float(first.max())
    assert float((first - H.diagonal().abs()).mean()) > 10 * float((last - H.diagonal().abs()).abs().mean())


def test_one_probe_is_z_times_hz() -> None:
    H = exact()
    z = dense.flat(probe(dense.trainable(mlp()), 7, 0))
    torch.testing.assert_close(estimated(seed=7), z * (H @ z))


def test_batches_and_micro_batches_share_their_probes() -> None:
    model = mlp()
    parts = [(X[:2], Y[:2]), (X[2:], Y[2:])]
    split = dense.flat(estimate(HutchinsonDiagonal(), model, F.cross_entropy, parts).diagonal())
    torch.testing.assert_close(split, estimated())


def test_refreshes_come_at_the_interval_with_new_probes_and_average() -> None:
    H, beta = exact(), 0.9
    estimator = HutchinsonDiagonal(beta=beta, interval=2, seed=3)
    model = mlp()
    params = dense.trainable(model)
    state = estimator.init(params)
    seen = []
    for step in range(4):
        graph = LossGraph(F.cross_entropy(model(X), Y), params)
        statistics = estimator.measure(state, graph) if estimator.due(state) else {}
        assert bool(statistics) == (step in (0, 2))
        if statistics:
            z = dense.flat(probe(params, 3, step))
            seen.append(z * (H @ z))
        estimator.update(state, Observation(graph.gradient(), statistics=statistics))
    mean = (beta * seen[0] + seen[1]) / (beta + 1)
    torch.testing.assert_close(dense.flat(estimator.operator(state).diagonal()), mean)


@pytest.mark.parametrize(
    ("name", "value"),
    [("probes", 0), ("interval", 0), ("beta", 1.0), ("beta", -0.1), ("distribution", "normal")],
)
def test_bad_arguments_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        HutchinsonDiagonal(**{name: value})  # type: ignore[arg-type]


def kernel_means(h: Tensor, block: int) -> Tensor:
    """Equation (10) entry by entry: the mean over the kernel, or over a run of a matrix's row."""
    out = torch.empty_like(h)
    if h.dim() > 2:
        for o in range(h.shape[0]):
            for i in range(h.shape[1]):
                out[o, i] = sum(h[o, i].reshape(-1).tolist()) / h[o, i].numel()
        return out
    if h.dim() < 2:
        return h.clone()
    for o in range(h.shape[0]):
        for i in range(h.shape[1]):
            run = range(i - i % block, min(i - i % block + block, h.shape[1]))
            out[o, i] = sum(float(h[o, k]) for k in run) / len(run)
    return out


@pytest.mark.parametrize("block", [1, 2, 3])
def test_spatial_average_is_the_mean_over_kernels_and_runs(block: int) -> None:
    model = seeded(nn.Sequential(nn.Conv2d(1, 2, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))
    batch = [(reals(N, 1, 3, 4), Y)]
    plain = estimate(HutchinsonDiagonal(probes=3, seed=1), model, F.cross_entropy, batch).diagonal()
    averaged = HutchinsonDiagonal(probes=3, seed=1, spatial_average=True, block_size=block)
    found = estimate(averaged, model, F.cross_entropy, batch).diagonal()
    for ours, h in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, kernel_means(h, block), rtol=1e-12, atol=1e-14)
    assert float((found[0] - plain[0]).abs().max()) > 0.01  # there was something to average
    assert bool((found[0] < 0).any() or (found[2] < 0).any())  # signed


def test_spatial_average_has_the_mean_of_the_exact_diagonal_as_its_mean() -> None:
    # 1,000 probes, seed 0: each mean within 4.5 of the means of its entries' standard errors.
    model = seeded(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    x, K = reals(N, 2, 4), 1000
    params = dense.trainable(model)
    H = dense.hessian(F.cross_entropy(model(x), Y), params)
    exact, errors = (dense.split(v, params) for v in (H.diagonal(), deviation(H, "rademacher") / K**0.5))
    averaged = HutchinsonDiagonal(probes=K, spatial_average=True, block_size=2)
    found = estimate(averaged, model, F.cross_entropy, [(x, Y)]).diagonal()
    for ours, h, error in zip(found, exact, errors, strict=True):
        assert bool(((ours - kernel_means(h, 2)).abs() < 4.5 * kernel_means(error, 2)).all())


def test_adahessian_averages_as_hutchinson_does() -> None:
    model = seeded(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)))
    batch = [(reals(N, 2, 4), Y)]
    hutchinson = HutchinsonDiagonal(seed=2, spatial_average=True, block_size=2)
    signed = estimate(hutchinson, model, F.cross_entropy, batch).diagonal()
    root = estimate(AdaHessianDiagonal(seed=2, block_size=2), model, F.cross_entropy, batch).diagonal()
    for a, b in zip(root, signed, strict=True):
        torch.testing.assert_close(a, b.abs(), rtol=1e-12, atol=1e-14)


def test_block_sizes_that_mean_nothing_are_refused() -> None:
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match="block_size must be an integer >= 1"):
            HutchinsonDiagonal(spatial_average=True, block_size=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without spatial_average=True"):
        HutchinsonDiagonal(block_size=4)
