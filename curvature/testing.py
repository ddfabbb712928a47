"""Public conformance check: does a curvature estimator keep the laws of this package?

Run it over an estimator of your own; it raises :class:`AssertionError` with the law that is broken. The tests of this
package run it over every registered estimator, one law at a time::

    @pytest.mark.parametrize("law", curvature.testing.LAWS)
    def test_my_estimator(law):
        curvature.testing.check_estimator(MyEstimator, only=[law])
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvature import vectors
from curvature.estimate import add_statistics, estimate
from curvature.krylov_solve import ConvergenceError
from curvature.loss_graph import LossGraph
from curvature.protocols import (
    TRANSIENT,
    CurvatureEstimator,
    CurvatureOperator,
    Needs,
    Observation,
    SingularCurvatureError,
    State,
    Statistics,
)

SAMPLES = 7


@dataclass
class Subject:
    """An estimator and a small problem: seven points, three classes, a network of 31 weights, float64.

    Args:
        factory: the estimator, its class, or ``factory(model=…)``.
        options: of the class.
        semidefinite: whether B must be positive semidefinite.
        splits: whether several batches must equal the one concatenated batch (a sampled curvature need not).
        refreshes: whether a first update must equal :func:`curvature.estimate` on the same batch.
        dtype: of the parameters.
    """

    factory: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    semidefinite: bool = False
    splits: bool = True
    refreshes: bool = True
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 3, generator=g, dtype=torch.float64).to(self.dtype)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=g)

    def model(self, layout: str = "contiguous") -> nn.Module:
        """The network, the same at every call; ``layout="transposed"`` stores its weights with swapped strides."""
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(self.dtype)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
        if layout == "transposed":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
        return model

    def estimator(self, model: nn.Module) -> CurvatureEstimator:
        """The estimator for ``model``."""
        if not callable(self.factory):
            return cast(CurvatureEstimator, self.factory)
        options = dict(self.options)
        if "model" in inspect.signature(self.factory).parameters:
            options.setdefault("model", model)
        return cast(CurvatureEstimator, self.factory(**options))

    def loss(self, model: nn.Module, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(loss, outputs)."""
        outputs = model(self.x[part])
        return nn.functional.cross_entropy(outputs, self.y[part]), outputs

    def estimate(self, model: nn.Module, parts: Sequence[slice] = (slice(None),)) -> CurvatureOperator:
        """The one-shot estimate over parts of the samples."""
        batches = [(self.x[part], self.y[part]) for part in parts]
        return estimate(self.estimator(model), model, nn.CrossEntropyLoss(), batches)

    def observe(
        self, estimator: CurvatureEstimator, state: State, model: nn.Module, without: Collection[int] = ()
    ) -> None:
        """One update, as an optimizer gives it; ``without`` names parameters whose gradient is None."""
        params = list(model.parameters())
        loss, outputs = self.loss(model)
        graph = LossGraph(loss, params, outputs)
        gradient = [None if i in without else g for i, g in enumerate(graph.gradient())]
        statistics: Statistics = {}
        if estimator.needs.graph and is_due(estimator, state) and hasattr(estimator, "measure"):
            add_statistics(statistics, estimator.measure(state, graph))
        graphs = [graph] if getattr(estimator, "keeps_graph", False) else []
        changes = [torch.zeros_like(p) for p in params] if getattr(estimator, "tracks_steps", False) else None
        estimator.update(
            state,
            Observation(gradient, loss.detach(), SAMPLES, statistics, graphs, params, step_change=changes),
        )


def is_due(estimator: CurvatureEstimator, state: State) -> bool:
    """Whether the coming step measures."""
    due = getattr(estimator, "due", None)
    return True if due is None else bool(due(state))


def check_estimator(
    estimator: Any,
    *,
    options: Mapping[str, Any] | None = None,
    semidefinite: bool = False,
    splits: bool = True,
    refreshes: bool = True,
    only: Collection[str] = (),
) -> None:
    """Check the laws of curvature estimators on a small network in float64, each against dense matrices.

    Args:
        estimator: a class (its field ``model``, if it has one, is filled in), a function ``factory(model=…)``, or an
            instance that holds no model.
        options: arguments of the class.
        semidefinite: whether B promises to be positive semidefinite, as Gauss-Newton and Fisher matrices do; an
            estimator whose own ``semidefinite`` is true has promised it.
        splits: whether batches promise to combine exactly; false for curvature that draws labels.
        refreshes: whether the first update promises to equal the one-shot estimate.
        only: names of :data:`LAWS` to check; all by default.

    Raises:
        AssertionError: naming the law that is broken, and by how much.
        ValueError: for an unknown law.

    >>> from curvature import HutchinsonDiagonal
    >>> check_estimator(HutchinsonDiagonal)
    >>> check_estimator(HutchinsonDiagonal, semidefinite=True, only=["semidefinite"])
    Traceback (most recent call last):
    AssertionError: semidefinite: ...

    Cost: a second or two.
    """
    unknown = sorted(set(only) - LAWS.keys())
    if unknown:
        raise ValueError(f"only must name laws out of {sorted(LAWS)}, got {unknown}")
    for name in only or LAWS:
        subject = Subject(estimator, dict(options or {}), semidefinite, splits, refreshes)
        try:
            LAWS[name](subject)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# -- laws ------------------------------------------------------------------------------------------------------


def check_contract(subject: Subject) -> None:
    """A frozen dataclass with needs, init, update and operator."""
    estimator = subject.estimator(subject.model())
    for name in ("init", "update", "operator"):
        assert callable(getattr(estimator, name, None)), f"the estimator has no method {name!r}"
    assert isinstance(estimator.needs, Needs), f"needs must be a Needs, got {estimator.needs!r}"
    parameters = getattr(type(estimator), "__dataclass_params__", None)
    assert parameters is not None, "the estimator must be a dataclass of its hyperparameters"
    assert parameters.frozen, "the dataclass must be frozen: what an estimator learns goes into its state"


def check_state(subject: Subject) -> None:
    """State holds tensors, ints and floats; a list has one tensor a parameter, on its device, float32 or wider."""
    for dtype in (torch.float64, torch.bfloat16):
        narrow = dataclasses.replace(subject, dtype=dtype)
        model = narrow.model()
        params = list(model.parameters())
        estimator = narrow.estimator(model)
        state = estimator.init(params)
        if dtype == torch.float64:
            narrow.observe(estimator, state, model)
        for key, value in state.items():
            if key == TRANSIENT:
                continue
            if isinstance(value, list):
                assert len(value) == len(params), (
                    f"state[{key!r}] must hold {len(params)} tensors, got {len(value)}"
                )
                for x, p in zip(value, params, strict=True):
                    assert isinstance(x, Tensor), f"state[{key!r}] must hold tensors, got {type(x).__name__}"
                    assert x.device == p.device, (
                        f"state[{key!r}] is on {x.device}, its parameter on {p.device}"
                    )
                    assert not x.requires_grad, f"state[{key!r}] holds a graph"
                    wide = (
                        not x.is_floating_point()
                        or x.dtype == vectors.compute_dtype(p.dtype)
                        or x.numel() <= 1
                    )
                    assert wide or x.untyped_storage().nbytes() < x.numel() * x.element_size(), (
                        f"state[{key!r}] is {x.dtype} for a {p.dtype} parameter; keep it in float32 or wider"
                    )
            else:
                kinds = (Tensor, int, float)
                assert isinstance(value, kinds), (
                    f"state[{key!r}] must be a tensor, int or float, got {type(value)}"
                )


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
    """solve(B v + λv, λ) is v, or a documented error; a negative damping is refused."""
    op = subject.estimate(subject.model())
    like = split_columns(op, op.to_dense())
    v = random_vector(like, 2)
    for damping in (1e-2, 1.0, torch.tensor(3.0, dtype=torch.float64)):
        right = [b + float(damping) * x for b, x in zip(op.matvec(v), v, strict=True)]
        try:
            found = op.solve(right, damping)
        except (SingularCurvatureError, NotImplementedError, ConvergenceError):
            continue
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


def check_side_effects(subject: Subject) -> None:
    """An estimate leaves .grad, parameters, the training mode, hooks and the global random state as they were."""
    model = subject.model()
    model.register_buffer("still", torch.zeros(2))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    random_state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    subject.estimate(model).to_dense()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    subject.observe(estimator, state, model)
    estimator.operator(state).to_dense()
    assert torch.equal(random_state, torch.get_rng_state()), (
        "the global random state moved: draw from a torch.Generator"
    )
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old), "a parameter was changed"
        assert p.grad is not None, ".grad was removed"
        assert bool((p.grad == 0.5).all()), ".grad was written to"
        assert p.requires_grad, "requires_grad was changed"
    assert modes == [m.training for m in model.modules()], "the training mode was changed"


def check_stays(subject: Subject) -> None:
    """An operator is B at the θ where it was observed, after the parameters moved on too."""
    model = subject.model()
    op = subject.estimate(model)
    before = op.to_dense().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(op.to_dense(), before), "the operator changed when the parameters did"


def check_first_update(subject: Subject) -> None:
    """The first update is the observation: running means are bias-corrected."""
    if not subject.refreshes:
        return
    model = subject.model()
    exact = subject.estimate(model).to_dense()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    subject.observe(estimator, state, model)
    close(
        estimator.operator(state).to_dense(),
        exact,
        "after one update the operator is not the observation",
        exact,
        1e-7,
    )


def check_none(subject: Subject) -> None:
    """A parameter whose gradient is None keeps its state."""
    model = subject.model()
    params = list(model.parameters())
    estimator = subject.estimator(model)
    state = estimator.init(params)
    subject.observe(estimator, state, model)
    before = {k: [x.clone() for x in v] for k, v in state.items() if isinstance(v, list)}
    with torch.no_grad():
        for p in params:
            p.mul_(1.1)
    frozen = {0, 1}  # a layer's weight and bias: they may be one block
    subject.observe(estimator, state, model, without=frozen)
    for key, values in before.items():
        for i in frozen:
            now = cast("list[Tensor]", state[key])[i]
            if now.numel():  # equal to rounding: a basis may be computed anew from the same factors
                what = f"state[{key!r}][{i}] moved although that parameter's gradient was None"
                close(now, values[i], what, values[i], 1e-10)


def check_saving(subject: Subject) -> None:
    """State survives torch.save and torch.load(weights_only=True), and the run goes on as if uninterrupted."""
    model = subject.model()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    for _ in range(2):
        subject.observe(estimator, state, model)
        transient = state.pop(TRANSIENT, None)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    results = []
    for held in (state, loaded):
        subject.observe(estimator, held, model)
        results.append(estimator.operator(held).to_dense())
        held.pop(TRANSIENT, None)
    del transient
    assert torch.equal(*results), "a loaded state goes on differently from the one that was saved"


def check_layouts(subject: Subject) -> None:
    """Parameters that are not contiguous have the same curvature."""
    plain = subject.estimate(subject.model()).to_dense()
    strided = subject.estimate(subject.model("transposed")).to_dense()
    close(strided, plain, "parameters with other strides have another curvature", plain, 1e-9)


LAWS: dict[str, Callable[[Subject], None]] = {
    "contract": check_contract,
    "state": check_state,
    "matvec": check_matvec,
    "diagonal": check_diagonal,
    "semidefinite": check_semidefinite,
    "solve": check_solve,
    "vectors": check_vectors,
    "splits": check_splits,
    "repeats": check_repeats,
    "side effects": check_side_effects,
    "stays": check_stays,
    "first update": check_first_update,
    "none": check_none,
    "saving": check_saving,
    "layouts": check_layouts,
}
"""Every law by name."""


# -- helpers ---------------------------------------------------------------------------------------------------


def flat(v: Sequence[Tensor]) -> Tensor:
    """All elements in C order, float64."""
    return vectors.flatten([x.detach() for x in v]).double()


def split_columns(op: CurvatureOperator, B: Tensor) -> list[Tensor]:
    """Zeros shaped like the parameters."""
    return [torch.zeros_like(d, dtype=B.dtype) for d in op.diagonal()]


def random_vector(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A vector of standard normals."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in like]


def close(ours: Tensor, theirs: Tensor, message: str, scale: Tensor, tolerance: float = 1e-8) -> None:
    """Assert equality up to ``tolerance`` of the largest entry of ``scale``."""
    error = float((ours - theirs).abs().max())
    size = float(scale.abs().max())
    assert error <= tolerance * (size or 1.0), f"{message}: off by {error:.3g}, largest entry {size:.3g}"
