"""Laws of the matrix: its products, columns, diagonal, inverse; the same for any split, seed, layout of memory."""

from __future__ import annotations

import itertools

import torch

from curvature import vectors
from curvature.krylov_solve import ConvergenceError
from curvature.protocols import SingularCurvatureError
from curvature.testing.subject import SAMPLES, Subject, close, flat, random_vector, split_columns


def check_matvec(subject: Subject) -> None:
    """B e_i is the dense matrix's column, and B is linear and symmetric."""
    op = subject.estimate(subject.model())
    B = op.to_dense()
    like = split_columns(op, B)
    size = B.shape[0]
    assert size == sum(x.numel() for x in like), f"to_dense must be (P, P) with P = {size}"
    for i in range(size):
        unit = torch.zeros(size, dtype=B.dtype)
        unit[i] = 1.0
        close(
            flat(op.matvec(vectors.unflatten(unit, like))),
            B[:, i],
            f"matvec(e_{i}) is not column {i} of to_dense()",
            B,
        )
    close(B, B.T, "to_dense() is not symmetric", B)
    u, v = random_vector(like, 0), random_vector(like, 1)
    op.matvec(u)
    assert torch.equal(flat(u), flat(random_vector(like, 0))), (
        "matvec wrote into the vector that it was given"
    )
    both = [2.0 * a - 3.0 * b for a, b in zip(u, v, strict=True)]
    ours = 2.0 * flat(op.matvec(u)) - 3.0 * flat(op.matvec(v))
    close(flat(op.matvec(both)), ours, "matvec is not linear", B * size)


def check_diagonal(subject: Subject) -> None:
    """diagonal() is the dense diagonal, shaped like the parameters."""
    model = subject.model()
    op = subject.estimate(model)
    diagonal = op.diagonal()
    shapes = [p.shape for p in model.parameters()]
    assert [d.shape for d in diagonal] == shapes, (
        f"diagonal() has shapes {[d.shape for d in diagonal]}, want {shapes}"
    )
    B = op.to_dense()
    close(flat(diagonal), B.diagonal(), "diagonal() is not the diagonal of to_dense()", B)


def check_semidefinite(subject: Subject) -> None:
    """Where promised, here or by the estimator itself: no eigenvalue below zero."""
    model = subject.model()
    if not (subject.semidefinite or getattr(subject.estimator(model), "semidefinite", None)):
        return
    B = subject.estimate(model).to_dense()
    values = torch.linalg.eigvalsh(0.5 * (B + B.T))
    floor = -1e-9 * float(values.abs().max())
    assert float(values[0]) >= floor, (
        f"the smallest eigenvalue is {float(values[0]):.3g}, the largest {float(values[-1]):.3g}"
    )


def check_solve(subject: Subject) -> None:
    """solve(B v + λv, λ) is v, or a documented error; a singular B at λ = 0 and a negative damping are refused."""
    op = subject.estimate(subject.model())
    B = op.to_dense()
    like = split_columns(op, B)
    v = random_vector(like, 2)
    singular = torch.linalg.svdvals(B)
    if bool(singular[-1] <= 1e-15 * singular[0]):
        try:
            op.solve(v, 0.0)
        except (SingularCurvatureError, NotImplementedError, ConvergenceError):
            pass
        else:
            raise AssertionError("solve(v, 0) of a singular B must raise curvature.SingularCurvatureError")
    for damping in (1e-2, 1.0, torch.tensor(3.0, dtype=torch.float64)):
        right = [b + float(damping) * x for b, x in zip(op.matvec(v), v, strict=True)]
        given = flat(right).clone()
        try:
            found = op.solve(right, damping)
        except (SingularCurvatureError, NotImplementedError, ConvergenceError):
            continue
        assert torch.equal(flat(right), given), "solve wrote into the vector that it was given"
        close(
            flat(found), flat(v), f"solve(matvec(v) + λv, λ) is not v at λ = {float(damping)}", flat(v), 1e-6
        )
    try:
        op.solve(v, -1.0)
    except (ValueError, NotImplementedError):
        return
    raise AssertionError("solve(v, damping=-1) must raise ValueError")


def check_vectors(subject: Subject) -> None:
    """A vector of another shape is refused."""
    op = subject.estimate(subject.model())
    for bad in ([torch.zeros(2)], [torch.zeros(1, 1) for _ in range(4)]):
        for name in ("matvec", "solve"):
            try:
                getattr(op, name)(bad)
            except (ValueError, NotImplementedError):
                continue
            except Exception as error:
                raise AssertionError(
                    f"{name} of a vector that is not shaped like the parameters must raise ValueError, not "
                    f"{type(error).__name__}: call check_vector(v) of curvature.Operator first"
                ) from error
            raise AssertionError(
                f"{name} of a vector that is not shaped like the parameters must raise ValueError"
            )


def check_splits(subject: Subject) -> None:
    """Any split of the samples, with an uneven last part, gives what the whole batch gives."""
    if not subject.splits:
        return
    model = subject.model()
    whole = subject.estimate(model).to_dense()
    for cuts in ((3, 6), (1, 2, 3), (4,)):
        edges = (0, *cuts, SAMPLES)
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        close(
            subject.estimate(model, parts).to_dense(),
            whole,
            f"batches cut at {cuts} differ from the whole",
            whole,
            1e-7,
        )


def check_repeats(subject: Subject) -> None:
    """The same seed gives the same matrix, bit for bit, whatever the global random state."""
    model = subject.model()
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(subject.estimate(model).to_dense())
    first, second = found
    assert torch.equal(first, second), f"two estimates differ by {float((first - second).abs().max()):.3g}"


def check_stays(subject: Subject) -> None:
    """An operator is B at the θ where it was observed, after the parameters moved on too."""
    model = subject.model()
    op = subject.estimate(model)
    before = op.to_dense().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(op.to_dense(), before), "the operator changed when the parameters did"


def check_layouts(subject: Subject) -> None:
    """Parameters that are not contiguous have the same curvature."""
    plain = subject.estimate(subject.model()).to_dense()
    strided = subject.estimate(subject.model("transposed")).to_dense()
    close(strided, plain, "parameters with other strides have another curvature", plain, 1e-9)
