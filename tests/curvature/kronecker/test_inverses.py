"""Formed inverses of factored damping: exact for the λ that is asked, whatever λ came before, and for a resumed run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import KFAC, estimate
from curvature.kronecker.inverses import FactoredKroneckerOperator
from curvature.protocols import CACHE, SingularCurvatureError
from optimizers import SecondOrder, build
from tests.curvature import dense


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(t: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (10,), generator=generator)


def train(model: nn.Module, optimizer: SecondOrder, steps: range) -> None:
    for t in steps:
        x, y = batch(t)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.backward(nn.functional.cross_entropy(outputs, y), outputs)
        optimizer.step()


def expected(model: nn.Module, x: Tensor, v: list[Tensor], damping: float) -> list[Tensor]:
    """By the paper's formula, for the last layer's weight and bias."""
    a = torch.cat([model[:2](x).detach(), torch.ones(len(x), 1)], 1)
    p = torch.softmax(model(x).detach(), 1)
    A, G = a.T @ a / len(x), (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    pi, root = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt(), damping**0.5
    V = torch.cat([v[2], v[3].unsqueeze(1)], 1)
    U = (
        torch.linalg.inv(G + root / pi * torch.eye(len(G)))
        @ V
        @ torch.linalg.inv(A + pi * root * torch.eye(len(A)))
    )
    return [U[:, :-1], U[:, -1]]


def test_each_damping_has_its_own_inverses_in_any_order() -> None:
    model, (x, y) = network(), batch(0)
    B = estimate(KFAC(model, damping_kind="factored"), model, nn.CrossEntropyLoss(), [(x, y)])
    assert isinstance(B, FactoredKroneckerOperator)
    v = [torch.randn_like(p) for p in model.parameters()]
    moving = torch.tensor(0.5, dtype=torch.float64)
    for damping in (0.1, 0.3, 0.1, moving, moving.fill_(0.02), 0.1):
        found = B.solve(v, damping)
        for p, q in zip(found[2:], expected(model, x, v, float(damping)), strict=True):
            assert dense.relative_error(p, q) < 1e-12


def test_product_diagonal_and_matrix_are_those_of_the_eigenbasis() -> None:
    model, (x, y) = network(), batch(0)
    factored, exact = (
        estimate(KFAC(model, damping_kind=kind), model, nn.CrossEntropyLoss(), [(x, y)])
        for kind in ("factored", "exact")
    )
    v = [torch.randn_like(p) for p in model.parameters()]
    for one, two in (
        (factored.matvec(v), exact.matvec(v)),
        (factored.diagonal(), exact.diagonal()),
        ([factored.to_dense()], [exact.to_dense()]),
    ):
        for p, q in zip(one, two, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_factor_that_rounding_made_indefinite_is_inverted_and_a_singular_one_raises() -> None:
    model = nn.Linear(40, 3).float()
    x = torch.randn(2, 40, dtype=torch.float32) * 1e4  # rank 2: the other eigenvalues are rounding of 1e8
    B = estimate(
        KFAC(model, damping_kind="factored"), model, nn.CrossEntropyLoss(), [(x, torch.tensor([0, 1]))]
    )
    v = [torch.randn_like(p) for p in model.parameters()]
    assert all(bool(p.isfinite().all()) for p in B.solve(v, 1e-12))
    with pytest.raises(SingularCurvatureError, match="singular"):
        B.solve(v, 0.0)


@pytest.mark.parametrize("options", [{}, {"factor_interval": 3}])
def test_resumed_and_copied_runs_go_on_bit_for_bit_in_every_part_of_the_schedule(
    options: dict[str, Any],
) -> None:
    def made(model: nn.Module) -> SecondOrder:
        return build(model, "kfac", damping="fixed", inverse_interval=3, **options)

    for at in (5, 11, 17):  # every step, in growing rounds, at the interval
        model, other = network(), network()
        optimizer, resumed = made(model), made(other)
        train(model, optimizer, range(at))
        train(other, resumed, range(90, 93))  # its own inverses, which the load makes worthless
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert CACHE not in resumed._curvature_state
        train(model, optimizer, range(at, at + 5))
        train(other, resumed, range(at, at + 5))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_inverses_are_formed_once_a_refresh_while_damping_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[int] = []
    real = torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda x: (formed.append(1), real(x))[1])
    model, (x, y) = network(), batch(0)
    B = estimate(KFAC(model, damping_kind="factored"), model, nn.CrossEntropyLoss(), [(x, y)])
    v = [torch.randn_like(p) for p in model.parameters()]
    damping = torch.tensor(0.1)
    for _ in range(3):
        B.solve(v, damping)
    assert len(formed) == 4  # two layers, two factors
