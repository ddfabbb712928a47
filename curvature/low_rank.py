"""The dominant part of the curvature: a randomised Nyström approximation, or Lanczos.

Legend: B the Gauss-Newton matrix or the Hessian (P, P), r the rank, Ω (P, k) orthonormal, k >= r, Y = B Ω the
sketch, U (P, r) orthonormal, μ (r,) the eigenvalues; B ≈ U diag(μ) Uᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from curvature import vectors
from curvature.loss_graph import LossGraph
from curvature.low_rank_operator import LowRankOperator, flat_rows, split_rows
from curvature.matrix_free import GaussNewton, Hessian, MatrixFreeOperator
from curvature.matrix_free.estimator import MatrixFreeEstimator
from curvature.probes import generator
from curvature.problem import Problem
from curvature.protocols import CurvatureOperator, Estimator, Needs, Observation, State, Statistics
from curvature.registry import estimators
from curvature.spectrum import extreme_eigenvalues

Of = Literal["gauss-newton", "hessian"]
Method = Literal["nystrom", "lanczos"]


@dataclass(frozen=True)
class LowRank(Estimator):
    """U diag(μ) Uᵀ, the leading eigenpairs of the curvature, refreshed on an interval; nothing outside their span.

    With a damping λ it is the cheapest curvature that knows directions across layers: (B + λI)⁻¹ is exact and costs
    two passes over U.

    Args:
        rank: r >= 1; at most P is used.
        of: ``"gauss-newton"`` (positive semidefinite) or ``"hessian"`` (its eigenvalues largest in magnitude, signed).
        method: ``"nystrom"``: one sketch Y = BΩ, additive over micro-batches and ranks, for Gauss-Newton; each refresh
            starts from the last one's U, so the approximation sharpens like a subspace iteration. ``"lanczos"``: as
            many products one after the other as the eigenpairs take, for both; they are within 10⁻³ of the largest,
            unless 4 r + 40 products did not suffice. ``"auto"`` picks Nyström where it can.
        interval: steps between refreshes, >= 1.
        oversampling: k - r >= 0, columns of the sketch beyond the rank.
        seed: of Ω, or of the first Lanczos vector.

    >>> from curvature import estimate
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> B = estimate(LowRank(rank=1), model, torch.nn.MSELoss(), [(x, torch.zeros(3, 1))])
    >>> B.to_dense().round(decimals=4)
    tensor([[6., 0., 0.],
            [0., 0., 0.],
            [0., 0., 0.]])

    Cost: k products a refresh (Nyström), O(P k²) beside them; 4 r bytes a float32 parameter of state.
    References: Frangella, Tropp & Udell 2023, arXiv 2110.02820, algorithm 2.1; Tropp et al. 2017, arXiv 1706.05736.
    """

    rank: int
    of: Of = "gauss-newton"
    method: Method | Literal["auto"] = "auto"
    interval: int = 10
    oversampling: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("interval", 1), ("oversampling", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.of not in get_args(Of):
            raise ValueError(f"of must be 'gauss-newton' or 'hessian', got {self.of!r}")
        if self.method not in (*get_args(Method), "auto"):
            raise ValueError(f"method must be 'nystrom', 'lanczos' or 'auto', got {self.method!r}")
        if self.of == "hessian" and self.method == "nystrom":
            raise ValueError(
                "method='nystrom' needs a positive semidefinite matrix, which the Hessian is not: use method='lanczos'"
            )

    @property
    def sketches(self) -> bool:
        """Whether a refresh is one sketch."""
        return self.method != "lanczos" and self.of == "gauss-newton"

    @property
    def needs(self) -> Needs:
        """Products with the chosen matrix."""
        return Needs.GRAD | (Needs.HVP if self.of == "hessian" else Needs.GGN)

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        """Lanczos takes its products one after the other, once all losses of the step are there."""
        return not self.sketches

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        """As the matrix that is approximated."""
        return self.of == "gauss-newton"

    @property
    def inner(self) -> MatrixFreeEstimator:
        """The estimator whose products are taken."""
        return Hessian() if self.of == "hessian" else GaussNewton()

    def init(self, params: Sequence[Tensor]) -> State:
        """U = 0 and μ = 0, of r rows however few elements there are: parameters may be added, and none changes shape.

        The step count is the host's, since it decides what is computed.
        """
        basis = [
            torch.zeros((self.rank, *p.shape), dtype=vectors.compute_dtype(p.dtype), device=p.device)
            for p in params
        ]
        return {"basis": basis, "eigenvalues": vectors.scalar_like(params).repeat(self.rank), "step": 0}

    def due(self, state: State) -> bool:
        """Every ``interval`` steps, beginning with the first."""
        return cast(int, state["step"]) % self.interval == 0

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """The sketch Y = BΩ of one loss."""
        if not self.sketches:
            return {}
        Omega = split_rows(self.test_vectors(state), graph.params)
        rows = [graph.ggn([x[j] for x in Omega]) for j in range(len(Omega[0]))]
        columns = zip(*rows, strict=True)  # of one parameter each
        return {"sketch": [torch.stack(parts).to(x.dtype) for parts, x in zip(columns, Omega, strict=True)]}

    def update(self, state: State, seen: Observation) -> None:
        """Refresh U and μ where something was measured."""
        due = self.due(state)
        if self.sketches and seen.statistics:
            sketch = flat_rows(cast("list[Tensor]", seen.statistics["sketch"]))
            self.store(state, *nystrom(self.test_vectors(state), sketch))
        elif not self.sketches and due:
            transient: State = {}
            self.inner.update(transient, seen)
            self.store(state, *self.leading(self.inner.operator(transient)))
        state["step"] = cast(int, state["step"]) + 1

    def operator(self, state: State) -> LowRankOperator:
        """U diag(μ) Uᵀ."""
        basis, eigenvalues = cast("list[Tensor]", state["basis"]), cast(Tensor, state["eigenvalues"])
        r = min(self.rank, vectors.numel([u[0] for u in basis]))
        return LowRankOperator([u[:r] for u in basis], eigenvalues[:r])

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """The approximation of the curvature over all batches of ``problem``."""
        state = self.init(problem.params)
        B = self.inner.estimate(problem)
        if self.sketches:
            Omega = self.test_vectors(state)
            like = cast("list[Tensor]", state["basis"])
            rows = [
                torch.cat([y.reshape(-1).to(Omega.device, Omega.dtype) for y in B.matvec(vector)])
                for vector in ([x[0] for x in split_rows(row[None], [u[0] for u in like])] for row in Omega)
            ]
            self.store(state, *nystrom(Omega, torch.stack(rows)))
        else:
            self.store(state, *self.leading(B))
        return self.operator(state)

    def test_vectors(self, state: State) -> Tensor:
        """Ωᵀ, (k, P): the last refresh's U and new Gaussian vectors, orthonormal; a function of the state alone."""
        basis = flat_rows(cast("list[Tensor]", state["basis"]))
        size = basis.shape[1]
        step = cast(int, state["step"])
        k = min(self.rank + self.oversampling, size)
        fresh = torch.randn(
            (k, size),
            generator=generator(self.seed, step, basis.device),
            device=basis.device,
            dtype=basis.dtype,
        )
        if step > 0:
            known = basis[:k]
            held = (known != 0).any(1, keepdim=True)  # fewer than r while the parameters were fewer
            fresh[: len(known)] = torch.where(held, known, fresh[: len(known)])
        Q: Tensor = torch.linalg.qr(fresh.T)[0]
        return Q.T

    def leading(self, B: MatrixFreeOperator) -> tuple[Tensor, Tensor]:
        """The eigenpairs largest in magnitude, by Lanczos: (r, P) and (r,)."""
        size = vectors.numel(B.like)
        r = min(self.rank, size)
        found = extreme_eigenvalues(
            B, r, "magnitude", tolerance=1e-3, max_products=min(size, 4 * r + 40), seed=self.seed
        )
        return flat_rows(
            [torch.stack(parts) for parts in zip(*found.eigenvectors, strict=True)]
        ), found.eigenvalues

    def store(self, state: State, U: Tensor, eigenvalues: Tensor) -> None:
        """The r leading pairs, in place."""
        basis, kept = cast("list[Tensor]", state["basis"]), cast(Tensor, state["eigenvalues"])
        r = min(self.rank, len(eigenvalues))
        for held, new in zip(basis, split_rows(U[:r], [b[0] for b in basis]), strict=True):
            held[:r].copy_(new)
            held[r:].zero_()
        kept[:r].copy_(eigenvalues[:r])
        kept[r:].zero_()


def nystrom(Omega: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """Y (ΩᵀY)⁺ Yᵀ as orthonormal rows (k, P) and eigenvalues (k,), the largest first.

    Args:
        Omega: Ωᵀ, (k, P), orthonormal rows.
        Y: (BΩ)ᵀ, (k, P), B positive semidefinite.

    Raises:
        ArithmeticError: where ΩᵀBΩ is not positive semidefinite to working precision, or not finite.

    The shift ν and its removal at the end keep the Cholesky factorisation stable (Frangella et al., algorithm 2.1).
    """
    norm = torch.linalg.matrix_norm(Y)
    if not bool(torch.isfinite(norm)):
        raise ArithmeticError("the sketch of the curvature is not finite: did the model diverge?")
    if bool(norm == 0):
        return Omega, torch.zeros(len(Omega), dtype=Y.dtype, device=Y.device)
    shift = torch.finfo(Y.dtype).eps * norm * Y.shape[1] ** 0.5
    for _ in range(4):  # rounding may exceed the first shift where products are noisy
        shifted = Y + shift * Omega
        core = Omega @ shifted.T
        C, info = torch.linalg.cholesky_ex(0.5 * (core + core.T))
        if int(info) == 0:
            break
        shift = 10 * shift
    else:
        raise ArithmeticError(
            "the curvature is not positive semidefinite, so it has no Nyström approximation: use method='lanczos'"
        )
    factor = torch.linalg.solve_triangular(C, shifted, upper=False)
    _, singular, U = torch.linalg.svd(factor, full_matrices=False)
    return U, (singular.square() - shift).clamp(min=0.0)


estimators.add("low-rank", LowRank)
