"""Exact curvature on random models: what claims exactness equals the dense reference, whatever the model is made of.

``python -m tests.laws.test_random_models 0 1000`` tries as many seeds as one likes.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature import (
    EKFAC,
    KFAC,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    Fisher,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HessianDiagonal,
    estimate,
)
from curvature.kronecker.layout import build_layout
from tests.curvature import dense
from tests.laws.random_models import Drawn, draw

TOLERANCE = 1e-8
#: Refusals that are right answers: each names what it cannot treat.
REFUSALS = ("belongs to several samples", "calls of", 'reduce" cannot sum', "row belongs to is not known")


def close(found: Tensor, expected: Tensor, what: str, scale: float | None = None) -> None:
    size = max(float(expected.abs().max()), scale or 0.0) or 1.0
    error = float((found - expected).abs().max()) / size
    assert error < TOLERANCE, f"{what}: off by {error:.1e}"


def splits(d: Drawn) -> list[tuple[Tensor, Tensor]]:
    """An uneven split in two, the larger part first."""
    cut = len(d.inputs) // 2 + 1
    return [(d.inputs[:cut], d.target[:cut]), (d.inputs[cut:], d.target[cut:])]


@sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative
def check(d: Drawn, refused: Counter[str] | None = None) -> None:
    """Everything that claims to be exact, on one model, in one batch and in two uneven ones."""
    refused = Counter() if refused is None else refused
    model, loss_fn, params = d.model, d.loss_fn, dense.trainable(d.model)
    batch, parts = [(d.inputs, d.target)], splits(d)
    z = model(d.inputs)
    loss = loss_fn(z, d.target)
    H, G = dense.hessian(loss, params), dense.gauss_newton(loss, z, params)
    scale = float(G.abs().max())
    state = torch.get_rng_state()

    def both_ways(
        make: Callable[[], Any], reference: Tensor, what: str, read: Callable[[Any], Tensor]
    ) -> None:
        for batches, way in ((batch, ""), (parts, ", split")):
            try:
                operator = estimate(make(), model, loss_fn, batches)
            except (ValueError, RuntimeError) as error:
                if not any(words in str(error) for words in REFUSALS):
                    raise AssertionError(f"{what}{way}: {error}") from error
                refused[what] += 1
                return
            close(read(operator), reference, what + way, scale)

    V = directions(len(H))

    def products(operator: Any) -> Tensor:
        return torch.stack([dense.flat(operator.matvec(dense.split(v, params))) for v in V], 1)

    def diagonal(operator: Any) -> Tensor:
        return dense.flat(operator.diagonal())

    both_ways(Hessian, H @ V.T, "Hessian", products)
    both_ways(HessianDiagonal, H.diagonal(), "HessianDiagonal", diagonal)
    both_ways(GaussNewton, G @ V.T, "GaussNewton", products)
    both_ways(GaussNewtonDiagonal, G.diagonal(), "GaussNewtonDiagonal", diagonal)
    if d.likelihood != "gaussian":  # a squared error is twice its negative logarithm
        both_ways(lambda: Fisher(d.likelihood), G @ V.T, "Fisher", products)
    c = d.sample_weights
    E = empirical(z, loss, c, params)
    both_ways(EmpiricalFisher, E @ V.T, "EmpiricalFisher", products)
    both_ways(
        lambda: EmpiricalFisherDiagonal(samples="per_sample"), E.diagonal(), "per-sample diagonal", diagonal
    )
    check_kronecker(d, params, G, c, refused)
    assert all(p.grad is None for p in params)
    assert torch.equal(state, torch.get_rng_state())


def directions(size: int) -> Tensor:
    """Three unit vectors and two others, (5, P)."""
    g = torch.Generator().manual_seed(size)
    units = torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=g)[:3]]
    return torch.cat([units, torch.randn(2, size, generator=g, dtype=torch.float64)])


def empirical(z: Tensor, loss: Tensor, c: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Σ u_n u_nᵀ / c_n, u_n by the rows of ∂f/∂z that are sample n's."""
    (r,) = torch.autograd.grad(loss, z, retain_graph=True)
    total = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64).diag()
    for n in range(len(c)):
        if float(c[n]) > 0:
            own = torch.zeros_like(r)
            own[n] = r[n]
            grads = torch.autograd.grad(z, params, own, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
            u = dense.flat(filled)
            total = total + torch.outer(u, u) / c[n]
    return total


def check_kronecker(d: Drawn, params: Sequence[Tensor], G: Tensor, c: Tensor, refused: Counter[str]) -> None:
    batch, parts = [(d.inputs, d.target)], splits(d)
    made: dict[str, Any] = {}
    for sharing in ("expand", "reduce"):
        for kind in (KFAC, EKFAC):
            name = f"{kind.__name__}, {sharing}"
            try:
                operator = estimate(kind(d.model, sharing=sharing), d.model, d.loss_fn, batch)
                split = estimate(kind(d.model, sharing=sharing), d.model, d.loss_fn, parts)
            except (ValueError, RuntimeError) as error:
                if not any(words in str(error) for words in REFUSALS):
                    raise AssertionError(f"{name}: {error}") from error
                refused[name] += 1
                continue
            B = operator.to_dense()
            close(split.to_dense(), B, name + ", split", float(G.abs().max()))
            close(B, B.T, name + ", symmetric")
            smallest = float(torch.linalg.eigvalsh(B)[0])
            assert smallest > -1e-9 * float(B.abs().max() + 1e-300), f"{name}: eigenvalue {smallest}"
            v = torch.sin(torch.arange(1.0, len(B) + 1, dtype=torch.float64))
            image = dense.split(B @ v + 0.1 * v, params)
            close(dense.flat(operator.solve(image, 0.1)), v, name + ", solve")
            close(dense.flat(operator.diagonal()), B.diagonal(), name + ", diagonal")
            made[name] = B
        if f"EKFAC, {sharing}" in made and f"KFAC, {sharing}" in made:
            blocks = torch.block_diag(*[torch.ones(p.numel(), p.numel()) for p in params]) > 0
            K, EK = made[f"KFAC, {sharing}"], made[f"EKFAC, {sharing}"]
            inside = (K != 0) | (EK != 0) | blocks
            far, near = ((G - B)[inside].norm() for B in (K, EK))
            assert float(near) <= float(far) * (1 + 1e-9) + 1e-12, f"{sharing}: EK-FAC {near}, K-FAC {far}"
            trace = float(G.diagonal().sum())
            assert abs(float(EK.diagonal().sum()) - trace) <= TOLERANCE * trace + 1e-14, (
                f"{sharing}: the trace"
            )
    fallback = build_layout(d.model, params).diagonal
    for name, B in made.items():
        at = 0
        for i, p in enumerate(params):
            if i in fallback:
                part = slice(at, at + p.numel())
                what = f"{name}, parameter {i} without a block"
                close(B.diagonal()[part], G.diagonal()[part], what, float(G.abs().max()))
            at += p.numel()


#: Together they have every kind of layer and loss that is drawn; 20 and 34 showed an error once.
SEEDS = [20, 29, 34, 45, 51, 95, 120, 133, 134, 148, 163, 218, 240, 248, 261, 273, 376]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:.*by the diagonal of the same curvature")
def test_random_model_has_its_exact_curvature(seed: int) -> None:
    check(draw(seed))


def search(first: int, last: int) -> int:
    """How many of the seeds fail; each is printed with its model."""
    refused: Counter[str] = Counter()
    failed = 0
    for seed in range(first, last):
        d = draw(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(d, refused)
        except Exception as error:
            failed += 1
            print(f"{type(error).__name__}: {error}\n{d.text}", flush=True)
    print(f"{last - first} seeds, {failed} failed; refused with reason: {dict(refused)}")
    return failed


if __name__ == "__main__":
    sys.exit(search(int(sys.argv[1]), int(sys.argv[2])) > 0)
