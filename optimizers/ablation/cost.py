"""What a step costs in gradients: the arithmetic of its matrix operations over that of one gradient.

A count of passes would call a Hessian product, a per-sample gradient and an eigendecomposition one thing each. So the
floating-point operations themselves are counted, of every product, convolution and factorisation that a step asks for,
and divided by those of one forward and backward pass of the same batch. Elementwise work is not counted: an AdamW step
costs 1. The number is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

STEPS = 20  # every interval that divides it is met equally often

aten = torch.ops.aten


def _order(matrix: Tensor) -> tuple[int, int]:
    """How many matrices, and the order of each."""
    return matrix.numel() // max(1, matrix.shape[-1] * matrix.shape[-2]), matrix.shape[-1]


def _cubic(factor: float) -> Callable[..., float]:
    def count(matrix: Tensor, *arguments: Any, **options: Any) -> float:
        number, n = _order(matrix)
        return factor * number * n**3

    return count


def _cholesky_solve(right: Tensor, factor: Tensor, *arguments: Any, **options: Any) -> float:
    return 2.0 * right.numel() * factor.shape[-1]


def _triangular_solve(factor: Tensor, right: Tensor, *arguments: Any, **options: Any) -> float:
    return float(right.numel() * factor.shape[-1])


def _qr(matrix: Tensor, *arguments: Any, **options: Any) -> float:
    m, n = matrix.shape[-2:]
    number = matrix.numel() // max(1, m * n)
    k = min(m, n)
    return number * (4.0 * m * n * k - 4.0 * k**3 / 3)


def _lu_solve(matrix: Tensor, right: Tensor, *arguments: Any, **options: Any) -> float:
    number, n = _order(matrix)
    return number * 2.0 / 3.0 * n**3 + 2.0 * right.numel() * n


# Golub & Van Loan 2013, Matrix Computations, sections 4.2, 5.2, 8.3, 8.6: leading terms
FACTORISATIONS: dict[Any, Callable[..., float]] = {
    aten._linalg_eigh: _cubic(9.0),
    aten.linalg_cholesky_ex: _cubic(1.0 / 3.0),
    aten.cholesky_inverse: _cubic(2.0 / 3.0),
    aten.linalg_inv_ex: _cubic(2.0),
    aten.cholesky_solve: _cholesky_solve,
    aten.linalg_solve_triangular: _triangular_solve,
    aten.linalg_qr: _qr,
    aten._linalg_solve_ex: _lu_solve,
    aten._linalg_svd: _cubic(22.0),
}


@dataclass(frozen=True)
class StepCost:
    """What the steps of a run cost, in gradients.

    Args:
        opening: of each of the first steps, where these cost more or less than what follows.
        later: of every step after them, on average.

    >>> StepCost((4.0, 4.0), 2.0).of(3)
    10.0
    """

    opening: tuple[float, ...]
    later: float

    def of(self, steps: int) -> float:
        """Return what the first `steps` of a run cost together."""
        return sum(self.opening[:steps]) + max(0, steps - len(self.opening)) * self.later


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of products, convolutions and factorisations while it is entered.

    >>> with FlopCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.total
    48.0
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and add its count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += float(flop_registry[packet](*args, **kwargs, out_val=out))
        elif packet in FACTORISATIONS:
            self.total += FACTORISATIONS[packet](*args, **kwargs)
        return out


def gradient_flops(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, target: Tensor
) -> float:
    """Return the operations of one forward and backward pass.

    Args:
        model: whose gradient is taken; ``.grad`` is not touched.
        loss_fn: (outputs, target) to a 0-d tensor.
        inputs: of a batch.
        target: of that batch.

    Returns:
        Multiplications and additions.
    """
    with FlopCounter() as counter:
        loss = loss_fn(model(inputs), target)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return float(counter.total)
