"""The operators: products, exact inverses, diagonals and dense matrices agree; damping; EK-FAC against K-FAC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import EKFAC, KFAC, SingularCurvatureError, estimate
from tests.curvature import dense
from tests.curvature.kronecker.reference import block_diagonal, module_blocks

TIGHT = 1e-10


class Mixed(nn.Module):
    """Every kind of block: convolution with groups, embedding, attention, norm, linear, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.attention(x, x, x)[0])
        x = torch.tanh(self.conv(x.mT).mT) * self.scale
        return self.head(x.mean(1))


def mixed() -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    return Mixed(), nn.CrossEntropyLoss(), [(torch.tensor([[1, 2, 0], [3, 3, 4]]), torch.tensor([0, 2]))]


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize(
    "options", [{}, {"sharing": "reduce"}, {"fisher": "empirical"}, {"fisher": "mc"}], ids=str
)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_operator_is_one_matrix_seen_in_five_ways(kind: type, options: dict[str, Any]) -> None:
    model, loss_fn, batches = mixed()
    B = estimate(kind(model, **options), model, loss_fn, batches)
    D, params = B.to_dense(), dense.trainable(model)
    assert dense.relative_error(D, D.T) < TIGHT
    assert float(torch.linalg.eigvalsh(D).min()) > -TIGHT * float(D.abs().max())
    columns = [dense.flat(B.matvec(dense.split(e, params))) for e in torch.eye(len(D))]
    assert dense.relative_error(torch.stack(columns, 1), D) < TIGHT
    assert dense.relative_error(dense.flat(B.diagonal()), D.diagonal()) < TIGHT
    v = torch.randn(len(D))
    for damping in (0.3, torch.tensor(1e-3)):
        w = D @ v + damping * v
        assert dense.relative_error(dense.flat(B.solve(dense.split(w, params), damping)), v) < 1e-8


@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_is_never_further_from_gauss_newton(sharing: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model, loss_fn, batches = mixed()
        x, y = batches[0]
        z = model(x)
        GN = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))
        k = estimate(KFAC(model, sharing=sharing), model, loss_fn, batches).to_dense()
        e = estimate(EKFAC(model, sharing=sharing), model, loss_fn, batches).to_dense()
        assert float((e - GN).norm()) <= float((k - GN).norm()) * (1 + 1e-12)
        assert float((e - GN).norm()) < (1 - 1e-5) * float((k - GN).norm())  # the premise: there is room


def test_ekfac_eigenvalues_are_the_diagonal_of_gauss_newton_in_its_basis() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    B = estimate(EKFAC(model), model, nn.CrossEntropyLoss(), [(x, y)])
    z = model(x)
    GN = dense.gauss_newton(nn.functional.cross_entropy(z, y), z, dense.trainable(model))
    for block in B.blocks:
        weight, bias = model[int(block.block.modules[0])].weight, model[int(block.block.modules[0])].bias
        params = dense.trainable(model)
        start = sum(p.numel() for p in params[: block.block.weight])
        index = torch.arange(start, start + weight.numel()).reshape(weight.shape)
        index = torch.cat([index, (start + weight.numel() + torch.arange(bias.numel()))[:, None]], 1).reshape(
            -1
        )
        Q = torch.kron(block.Q_G[0], block.Q_A[0])
        expected = (Q.T @ GN[index[:, None], index] @ Q).diagonal()
        assert dense.relative_error(block.values.reshape(-1), expected) < TIGHT


def test_ekfac_equals_gauss_newton_where_kfac_does() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    B = estimate(EKFAC(model), model, nn.MSELoss(), [(x, y)]).to_dense()
    z = model(x)
    GN = dense.gauss_newton(nn.functional.mse_loss(z, y), z, dense.trainable(model))
    assert dense.relative_error(B, block_diagonal(GN, module_blocks(model))) < TIGHT


def test_factored_damping_damps_each_factor_by_its_share() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    x, y, lam = torch.randn(6, 3), torch.randint(0, 2, (6,)), 0.05
    B = estimate(KFAC(model, damping_kind="factored"), model, nn.CrossEntropyLoss(), [(x, y)])
    A = x.T @ x / 6
    p = torch.softmax(model(x).detach(), 1)
    G = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    pi = ((A.trace() / 3) / (G.trace() / 2)).sqrt()
    v = torch.randn(2, 3)
    root = lam**0.5
    expected = (
        torch.linalg.inv(G + root / pi * torch.eye(2)) @ v @ torch.linalg.inv(A + pi * root * torch.eye(3))
    )
    assert dense.relative_error(B.solve([v], lam)[0], expected) < TIGHT
    exact = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).solve([v], lam)[0]
    assert dense.relative_error(exact, expected) > 1e-3  # two different matrices, one asked for by name


def test_singular_curvature_raises_without_damping() -> None:
    model = nn.Linear(3, 2)
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    B = estimate(
        KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]
    )  # a softmax is blind to a shift of its logits
    v = [torch.randn_like(p) for p in model.parameters()]
    for nothing in (0.0, torch.zeros(())):
        with pytest.raises(SingularCurvatureError, match="damping"):
            B.solve(v, nothing)
    regular = estimate(KFAC(model), model, nn.MSELoss(), [(x, torch.randn(6, 2))])
    w = regular.solve(regular.matvec(v), 0.0)
    assert max(dense.relative_error(a, b) for a, b in zip(w, v, strict=True)) < 1e-8


def test_operator_keeps_the_curvature_of_its_moment() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    from curvature import LossGraph, Observation

    for kfac in (KFAC(model), EKFAC(model)):
        params = dense.trainable(model)
        state = kfac.init(params)
        before = []
        for _ in range(4):
            x, y = torch.randn(5, 3), torch.randn(5, 2)
            z = model(x)
            graph = LossGraph(nn.functional.mse_loss(z, y), params, z)
            kfac.update(
                state, Observation(graph.gradient(), statistics=kfac.measure(state, graph), parameters=params)
            )
            B = kfac.operator(state)
            before.append((B, B.to_dense()))
        for B, then in before:
            assert torch.equal(B.to_dense(), then)


def test_any_damping_regularises_float32_factors_of_wide_range() -> None:
    """In float32 the damping may lie far below the largest eigenvalue; the clamped eigenvalues stay invertible."""
    torch.manual_seed(0)
    model = nn.Linear(200, 3).float()
    x, y = 100.0 * torch.randn(64, 200), torch.randn(64, 3)
    B = estimate(KFAC(model), model, nn.MSELoss(), [(x.float(), y.float())])
    v = [torch.randn_like(p) for p in model.parameters()]
    for found in B.solve(v, 1e-3):
        assert bool(torch.isfinite(found).all())
