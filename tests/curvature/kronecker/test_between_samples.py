"""``between_samples="drop"``: batch norm in training mode, each sample's row by itself.

Legend: s_n a layer's output row of sample n, a_n its input row with a 1, u_n the gradient of the whole batch's loss by
s_n, so that it has passed the batch's statistics.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optimizers
from curvature import EKFAC, KFAC, estimate
from tests.curvature import dense

N, TIGHT = 6, 1e-10


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))


def by_hand(model: nn.Sequential, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The rows s of both linear layers and of the norm's scaling, x̂ of the norm, and the outputs."""
    first, norm, _, last = model
    s = first(x)
    normalised = (s - s.mean(0)) / (s.var(0, unbiased=False) + norm.eps).sqrt()
    y = norm.weight * normalised + norm.bias
    z = last(torch.tanh(y))
    return [s, y, z], normalised, z


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[:, :1])], 1)


def expected(model: nn.Sequential, x: Tensor, G: list[Tensor], squares: list[Tensor]) -> Tensor:
    """A ⊗ G of both layers, in the order of the parameters: weight (out, in), then bias."""
    (_, y, _), _, _ = by_hand(model, x)
    blocks = []
    for inputs, g in zip((x, torch.tanh(y)), G, strict=True):
        a = with_ones(inputs)
        B = torch.einsum("ij,kl->ikjl", g, a.T @ a / N)  # (out, in + 1, out, in + 1)
        out, wide = g.shape[0], a.shape[1]
        order = [o * wide + i for o in range(out) for i in range(wide - 1)]
        order += [o * wide + wide - 1 for o in range(out)]
        blocks.append(B.reshape(out * wide, out * wide)[order][:, order])
    return torch.block_diag(blocks[0], *(torch.diag(d) for d in squares), blocks[1]).detach()


def test_empirical_factors_are_those_of_the_rows() -> None:
    model, x, target = problem()
    ours = estimate(
        KFAC(model, fisher="empirical", between_samples="drop"),
        model,
        functional.cross_entropy,
        [(x, target)],
    ).to_dense()
    rows, normalised, z = by_hand(model, x)
    u = torch.autograd.grad(functional.cross_entropy(z, target), rows)
    G = [N * u[0].T @ u[0], N * u[2].T @ u[2]]
    squares = [N * (u[1] * normalised).square().sum(0), N * u[1].square().sum(0)]
    assert dense.relative_error(ours, expected(model, x, G, squares)) < TIGHT


def test_drawn_labels_approach_the_rows_own_curvature() -> None:
    """4,000 draws, seed 0: G → N Σ_m Σ_n J_mnᵀ (M_n / N²) J_mn with J_mn = ∂z_n/∂s_m and M_n = diag(p) - p pᵀ."""
    model, x, target = problem()
    loss = functional.cross_entropy
    draws = KFAC(model, fisher="mc", samples=4000, between_samples="drop")
    ours = estimate(draws, model, loss, [(x, target)]).to_dense()
    rows, normalised, z = by_hand(model, x)
    p = torch.softmax(z, 1).detach()
    M = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    G, squares = (
        [torch.zeros(4, 4).double(), torch.zeros(2, 2).double()],
        [torch.zeros(4).double() for _ in range(2)],
    )
    for n in range(N):
        of_class = [torch.autograd.grad(z[n, c], rows, retain_graph=True) for c in range(2)]
        J = [torch.stack(g) for g in zip(*of_class, strict=True)]
        for k, row in enumerate((0, 2)):
            G[k] += torch.einsum("cmi,cd,dmj->ij", J[row], M[n], J[row]) / N
        for k, scale in enumerate((normalised, torch.ones_like(normalised))):
            j = J[1] * scale
            squares[k] += torch.einsum("cmi,cd,dmi->i", j, M[n], j).detach() / N
    assert dense.relative_error(ours, expected(model, x, G, squares)) < 0.03


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_nothing_is_dropped_where_nothing_is_between(kind: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(2, (n,))) for n in (5, 3)]
    a, b = (
        estimate(
            kind(model, fisher="mc", between_samples=k), model, functional.cross_entropy, batches
        ).to_dense()
        for k in ("refuse", "drop")
    )
    assert torch.equal(a, b)


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norms[0](self.first(x)))
        x = functional.relu(x + self.norms[1](self.second(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("preset", [optimizers.KFAC, optimizers.EKFAC])
def test_presets_train_a_residual_network_with_batch_norms(preset: type[optimizers.SecondOrder]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(48, 1, 6, 6), torch.arange(48) % 3
    x += (y - 1.0).reshape(-1, 1, 1, 1)
    model = Residual()
    optimizer = preset(model, lr=0.3, damping="fixed", between_samples="drop")  # type: ignore[call-arg]
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        outputs = model(x)
        loss = functional.cross_entropy(outputs, y)
        losses.append(float(loss.detach()))
        optimizer.backward(loss, outputs)
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert int(model.norms[0].num_batches_tracked) == 25  # no forward pass beside those of the loop


def test_what_cannot_be_is_refused() -> None:
    model, x, target = problem()
    with pytest.raises(ValueError, match=r"'drop' does not go with fisher='type-2'.* fisher='mc'"):
        KFAC(model, between_samples="drop")
    with pytest.raises(ValueError, match="between_samples must be 'refuse' or 'drop', got 'ignore'"):
        KFAC(model, between_samples="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="several batches do not equal"):
        estimate(
            KFAC(model, fisher="mc", between_samples="drop"),
            model,
            functional.cross_entropy,
            [(x[:3], target[:3]), (x[3:], target[3:])],
        )
