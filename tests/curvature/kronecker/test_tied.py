"""An embedding tied to the head: two uses of one matrix with exchanged sides, written out as dense sums."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import EKFAC, KFAC, estimate
from curvature.kronecker.nearest import nearest_product
from tests.curvature import dense
from tests.curvature.kronecker.reference import softmax_hessian

TOKENS, LABELS = (
    torch.tensor([[0, 1, 1], [4, 2, 0], [3, 3, 1]]),
    torch.tensor([[1, 4, -100], [2, 2, 0], [3, 1, 0]]),
)
V, D = 5, 3


class Tied(nn.Module):
    """Positions do not mix, unless asked to."""

    def __init__(self, mixes: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D, padding_idx=0), nn.Linear(D, V, bias=bias)
        nn.init.normal_(self.embed.weight)
        self.head.weight = self.embed.weight
        self.mixes = mixes

    def hidden(self, embedded: Tensor) -> Tensor:
        return torch.tanh(embedded + embedded.cumsum(1) if self.mixes else embedded)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens)))


def loss_fn(z: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(z.flatten(0, 1), target.flatten())


def nearest(matrix: Tensor, m: int, n: int) -> Tensor:
    """The nearest Kronecker product, by the singular values of the rearranged matrix (Van Loan & Pitsianis 1993)."""
    arranged = matrix.reshape(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n)
    U, S, W = torch.linalg.svd(arranged)
    product = S[0] * torch.outer(U[:, 0], W[0])
    return product.reshape(m, m, n, n).permute(0, 2, 1, 3).reshape(m * n, m * n)


def literal(model: Tied) -> Tensor:
    """head ⊗ + embedding ⊗, position by position, rows [V, D] in C order; the nearest product to their sum."""
    kept = [(n, t) for n in range(3) for t in range(3) if LABELS[n, t] >= 0]
    c = 1 / len(kept)
    G, A, G_embed, A_embed = torch.zeros(V, V), torch.zeros(D, D), torch.zeros(D, D), torch.zeros(V)
    for n, t in kept:
        e = model.embed(TOKENS[n, t]).detach().requires_grad_()
        h = torch.tanh(e)
        z = model.head(h)
        H = softmax_hessian(z.detach())
        J = torch.stack([torch.autograd.grad(z[k], e, retain_graph=True)[0] for k in range(V)])
        h = h.detach()
        G, A = G + c * H, A + c * torch.outer(h, h)
        G_embed = G_embed + c * J.T @ H @ J
        A_embed[TOKENS[n, t]] += c * (TOKENS[n, t] != 0)  # the padding token has no gradient
    return nearest(torch.kron(G, A) + torch.kron(torch.diag(A_embed), G_embed), V, D)


def test_the_block_is_the_nearest_product_to_the_sum_of_both_uses() -> None:
    model = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing falls back
        B = estimate(KFAC(model), model, loss_fn, [(TOKENS, LABELS)])
    ours = B.to_dense()[: V * D, : V * D]
    assert dense.relative_error(ours, literal(model)) < 1e-10
    assert [b.block.modules for b in B.blocks] == [("head",), ("head",)]  # the weight, and the bias alone


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}], ids=str)
def test_ekfac_measures_both_uses_with_their_cross_terms(options: dict[str, Any], mixes: bool) -> None:
    model = Tied(mixes)
    B = estimate(EKFAC(model, **options), model, loss_fn, [(TOKENS, LABELS)])
    z = model(TOKENS)
    GN = dense.gauss_newton(loss_fn(z, LABELS), z, dense.trainable(model))[: V * D, : V * D]
    block = B.blocks[0]
    Q = torch.kron(block.Q_G[0], block.Q_A[0])
    assert dense.relative_error(block.values.reshape(-1), (Q.T @ GN @ Q).diagonal()) < 1e-10
    K = estimate(KFAC(model, **options), model, loss_fn, [(TOKENS, LABELS)]).to_dense()[: V * D, : V * D]
    E = B.to_dense()[: V * D, : V * D]
    assert float((E - GN).norm()) < float((K - GN).norm())


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical", "forward-only"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_every_fisher_gives_a_semidefinite_matrix_that_solves(kind: type, fisher: str) -> None:
    model = Tied(mixes=True, bias=False)
    B = estimate(kind(model, fisher=fisher), model, loss_fn, [(TOKENS, LABELS)])
    D_ = B.to_dense()
    assert float(torch.linalg.eigvalsh(D_).min()) > -1e-12 * float(D_.abs().max())
    v = torch.randn(V, D)
    (found,) = B.solve([B.matvec([v])[0] + 0.1 * v], 0.1)
    assert dense.relative_error(found, v) < 1e-9
    if fisher == "forward-only":  # I ⊗ E[h hᵀ] + diag(frequencies) ⊗ I
        kept = LABELS >= 0
        h = model.hidden(model.embed(TOKENS)).detach()[kept]
        frequency = functional.one_hot(TOKENS[kept & (TOKENS != 0)], V).to(h).sum(0) / kept.sum()
        total = torch.kron(torch.eye(V), h.T @ h / kept.sum()) + torch.kron(
            torch.diag(frequency), torch.eye(D)
        )
        assert dense.relative_error(D_, nearest(total, V, D)) < 1e-10


def test_any_split_gives_the_same() -> None:
    model = Tied(mixes=True)
    for kind in (KFAC, EKFAC):
        whole = estimate(kind(model), model, loss_fn, [(TOKENS, LABELS)]).to_dense()
        parts = [(TOKENS[:1], LABELS[:1]), (TOKENS[1:], LABELS[1:])]
        split = estimate(kind(model), model, loss_fn, parts, weight_fn=lambda y: (y >= 0).sum()).to_dense()
        assert dense.relative_error(split, whole) < 1e-10


def test_a_use_that_the_loss_does_not_reach_leaves_the_other_alone() -> None:
    class HeadOnly(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model, x, y = HeadOnly(), torch.randn(4, D), torch.tensor([0, 3, 1, 2])
    plain = nn.Sequential(nn.Linear(D, V))
    plain.load_state_dict({"0.weight": model.head.weight.detach(), "0.bias": model.head.bias.detach()})
    ours = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [(x, y)]).to_dense()[: V * D, : V * D]
    alone = estimate(KFAC(plain), plain, nn.CrossEntropyLoss(), [(x, y)]).to_dense()[: V * D, : V * D]
    assert dense.relative_error(ours, alone) < 1e-10


@pytest.mark.parametrize(
    "options", [{"max_dim": 4}, {"exclude": ("head",)}, {"exclude": ("embed",)}], ids=str
)
@pytest.mark.filterwarnings("ignore:.*treats these by the diagonal")
def test_where_one_of_both_has_no_factors_the_weight_has_its_exact_diagonal(options: dict[str, Any]) -> None:
    model = Tied(mixes=True)
    B = estimate(KFAC(model, **options), model, loss_fn, [(TOKENS, LABELS)])
    z = model(TOKENS)
    exact = dense.gauss_newton(loss_fn(z, LABELS), z, dense.trainable(model)).diagonal()
    assert dense.relative_error(dense.flat(B.diagonal())[: V * D], exact[: V * D]) < 1e-10


def test_nearest_product_is_the_leading_singular_pair() -> None:
    def semidefinite(n: int) -> Tensor:
        x = torch.randn(n, n)
        return (x @ x.T).unsqueeze(0)

    for seed in range(8):
        torch.manual_seed(seed)
        G, A = (semidefinite(4), semidefinite(4)), (semidefinite(3), semidefinite(3) * 10.0 ** (seed - 4))
        total = torch.kron(G[0][0], A[0][0]) + torch.kron(G[1][0], A[1][0])
        best_G, best_A = nearest_product((G[0], A[0]), (G[1], A[1]))
        assert dense.relative_error(torch.kron(best_G[0], best_A[0]), nearest(total, 4, 3)) < 1e-12
        assert float(torch.linalg.eigvalsh(best_G).min()) > 0
        assert float(torch.linalg.eigvalsh(best_A).min()) > 0
    zero, one = torch.zeros(1, 2, 2), torch.eye(2).unsqueeze(0)
    G0, A0 = nearest_product((zero, zero), (one, one))
    assert dense.relative_error(torch.kron(G0[0], A0[0]), torch.eye(4)) < 1e-12
    G0, A0 = nearest_product((zero, zero), (zero, one))
    assert not torch.kron(G0[0], A0[0]).any()


def test_a_tied_block_may_be_further_from_gauss_newton_than_the_diagonal() -> None:
    """Stated in the reference: many classes, few samples, positions that mix; three seeds of each kind.

    The sum of two products, and what both uses share, is then far from any one product.
    """

    class Mixing(nn.Module):
        def __init__(self, classes: int, size: int, scale: float, mixes: bool) -> None:
            super().__init__()
            self.embed, self.head, self.mixes = (
                nn.Embedding(classes, size),
                nn.Linear(size, classes, bias=False),
                mixes,
            )
            self.head.weight = self.embed.weight
            nn.init.normal_(self.embed.weight, std=scale)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embed(tokens)
            return self.head(torch.tanh(torch.tanh(h.cumsum(1)) if self.mixes else h))

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())

    def further(classes: int, size: int, scale: float, mixes: bool) -> int:
        count = 0
        for seed in range(3):
            torch.manual_seed(seed)
            model = Mixing(classes, size, scale, mixes)
            tokens, labels = torch.randint(0, classes, (2, 4, 3))
            z = model(tokens)
            GN = dense.gauss_newton(loss_fn(z, labels), z, dense.trainable(model))
            B = estimate(KFAC(model), model, loss_fn, [(tokens, labels)]).to_dense()
            count += bool((B - GN).norm() > (torch.diag(GN.diagonal()) - GN).norm())
        return count

    assert further(12, 4, 1.0, True) >= 2
    assert further(6, 3, 0.2, False) == 0
