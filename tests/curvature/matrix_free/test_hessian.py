"""The matrix-free Hessian against the dense one, in its three ways."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from curvature import (
    TRANSIENT,
    GaussNewton,
    Hessian,
    LossGraph,
    Observation,
    SingularCurvatureError,
    estimate,
)
from curvature.vectors import flatten
from tests.curvature import dense
from tests.curvature.matrix_free import cases

MODES = {"reverse": 1e-12, "forward": 1e-12, "finite-difference": 1e-7}


def reference(case: cases.Case) -> Tensor:
    model, loss_fn, x, y = case
    return dense.hessian(loss_fn(model(x), y), dense.trainable(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", cases.CASES)
def test_operator_equals_dense_hessian(name: str, mode: str) -> None:
    model, loss_fn, x, y = case = cases.CASES[name]()
    expected = reference(case)
    B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    assert dense.relative_error(B.to_dense(), expected) < MODES[mode]
    assert dense.relative_error(flatten(B.diagonal()), expected.diagonal()) < MODES[mode]


def test_graph_built_anew_for_every_product_gives_the_same() -> None:
    model, loss_fn, x, y = case = cases.layer_norm()
    B = estimate(Hessian(reuse_graph=False), model, loss_fn, [(x, y)])
    assert dense.relative_error(B.to_dense(), reference(case)) < 1e-12


def test_graph_is_kept_by_default_where_it_holds_little_beside_the_parameters() -> None:
    """64 parameters a unit and one activation, against the other way round."""
    torch.manual_seed(0)
    heavy, light = nn.Linear(64, 8).double(), nn.Linear(2, 1).double()
    built: list[bool] = []
    for model, rows, kept in ((heavy, 1, True), (light, 500, False)):
        x = torch.randn(rows, model.in_features).double()
        y = torch.randn(rows, model.out_features).double()

        def loss_fn(z: Tensor, target: Tensor) -> Tensor:
            built.append(True)
            return (z.sin() - target).square().mean()

        B = estimate(Hessian(), model, loss_fn, [(x, y)])
        built.clear()
        v = [torch.randn_like(p) for p in model.parameters()]
        first, second = B.matvec(v), B.matvec(v)
        assert len(built) == (1 if kept else 2)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reuse_graph_must_be_a_bool_or_auto() -> None:
    with pytest.raises(ValueError, match="reuse_graph must be True, False or \"auto\", got 'never'"):
        Hessian(reuse_graph="never")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_split_with_uneven_last_part_equals_one_batch(mode: str) -> None:
    model, loss_fn, x, y = case = cases.classification()
    batches = ((x[a:b], y[a:b]) for a, b in ((0, 3), (3, 6), (6, 7)))  # a generator: read once
    B = estimate(Hessian(hvp=mode), model, loss_fn, batches, weight_fn=len)  # type: ignore[arg-type]
    assert dense.relative_error(B.to_dense(), reference(case)) < MODES[mode]


@pytest.mark.parametrize("mode", MODES)
def test_operator_stays_where_it_was_observed(mode: str) -> None:
    model, loss_fn, x, y = case = cases.batch_norm()
    expected = reference(case)
    B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.eval()
    assert dense.relative_error(B.to_dense(), expected) < MODES[mode]


def test_frozen_parameter_that_moved_is_refused() -> None:
    model, loss_fn, x, y = cases.frozen()
    B = estimate(Hessian(), model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])], weight_fn=len)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"frozen parameter .*weight.* has changed"):
        B.to_dense()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_else_is_touched(mode: str) -> None:
    model, loss_fn, x, y = cases.batch_norm()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    model[1].train()
    with torch.no_grad():
        B.matvec([torch.ones_like(p) for p in model.parameters()])
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert model[1].training
    assert model.training


@pytest.mark.parametrize("mode", MODES)
def test_no_graph_is_left_behind(mode: str) -> None:
    model, loss_fn, x, y = cases.classification()
    seen: list[weakref.ref[Tensor]] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        value = loss_fn(outputs, target)
        seen.append(weakref.ref(value))
        return value

    B = estimate(Hessian(hvp=mode), model, loss, [(x, y)])  # type: ignore[arg-type]
    for _ in range(3):
        B.matvec([torch.ones_like(p) for p in model.parameters()])
    del B
    gc.collect()
    assert all(ref() is None for ref in seen)


@pytest.mark.parametrize("mode", MODES)
def test_memory_does_not_grow_over_1000_products(mode: str) -> None:
    model, loss_fn, x, y = cases.classification()
    B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    v = [torch.ones_like(p) for p in model.parameters()]

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    B.matvec(v)
    before = alive()
    for _ in range(1000 if mode == "reverse" else 100):
        B.matvec(v)
    assert alive() <= before


def test_relu_network_has_gauss_newton_diagonal_blocks() -> None:
    model = cases.mlp(nn.ReLU)
    _, loss_fn, x, y = cases.classification()
    z = model(x)
    G = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))
    H = estimate(Hessian(), model, loss_fn, [(x, y)]).to_dense()
    assert dense.relative_error(H, G) > 1e-2  # the premise: off the blocks they differ
    start = 0
    for p in model.parameters():
        block = slice(start, start + p.numel())
        assert dense.relative_error(H[block, block], G[block, block]) < 1e-12
        start += p.numel()


def test_loss_that_reads_parameters_through_the_model_is_included() -> None:
    model, loss_fn, x, y = cases.classification()

    def penalised(outputs: Tensor, target: Tensor) -> Tensor:
        return loss_fn(outputs, target) + sum(p.square().sum() for p in model.parameters())

    H = estimate(Hessian(), model, loss_fn, [(x, y)]).to_dense()
    B = estimate(Hessian(), model, penalised, [(x, y)]).to_dense()
    assert dense.relative_error(B - H, 2 * torch.eye(len(H), dtype=H.dtype)) < 1e-12


def test_loss_that_holds_a_parameter_of_its_own_is_refused() -> None:
    model, loss_fn, x, y = cases.classification()
    held = model[0].weight

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return loss_fn(outputs, target) + held.square().sum()

    with pytest.raises(ValueError, match="reads a parameter by a reference of its own"):
        estimate(Hessian(), model, loss, [(x, y)])


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_refused_and_the_random_state_stays(mode: str) -> None:
    model, loss_fn, x, y = cases.classification()
    noisy = nn.Sequential(nn.Dropout(0.5), model)
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"must be deterministic.*model\.eval"):
        estimate(Hessian(hvp=mode), noisy, loss_fn, [(x, y)])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), rng)
    noisy.eval()
    estimate(Hessian(hvp=mode), noisy, loss_fn, [(x, y)])  # type: ignore[arg-type]


def test_forward_mode_refuses_padding_idx_and_reverse_is_right() -> None:
    model, loss_fn, x, y = case = cases.tied(padding_idx=2)
    assert bool((x == 2).any())
    B = estimate(Hessian(hvp="forward"), model, loss_fn, [(x, y)])
    with pytest.raises(ValueError, match="padding_idx"):
        B.to_dense()
    assert (
        dense.relative_error(estimate(Hessian(), model, loss_fn, [(x, y)]).to_dense(), reference(case))
        < 1e-12
    )


class NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return g * (1 - x.tanh() ** 2)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoDoubleBackward.apply(x)


def test_model_without_double_backward_names_finite_differences_which_work() -> None:
    model, loss_fn, x, y = case = cases.classification()
    expected = reference(case)
    once = nn.Sequential(model[0], Once(), model[2])
    with pytest.raises(RuntimeError, match='hvp="finite-difference"'):
        estimate(Hessian(), once, loss_fn, [(x, y)]).to_dense()
    with pytest.raises(RuntimeError, match='hvp="finite-difference"'):
        estimate(Hessian(hvp="forward"), once, loss_fn, [(x, y)]).to_dense()
    B = estimate(Hessian(hvp="finite-difference"), once, loss_fn, [(x, y)])
    assert dense.relative_error(B.to_dense(), expected) < MODES["finite-difference"]


def test_compiled_model_names_finite_differences_which_work() -> None:
    model, loss_fn, x, y = cases.classification()
    expected = dense.hessian(loss_fn(model(x), y), dense.trainable(model))
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match='hvp="finite-difference"'):
        estimate(Hessian(), compiled, loss_fn, [(x, y)]).to_dense()
    B = estimate(Hessian(hvp="finite-difference"), compiled, loss_fn, [(x, y)])
    assert dense.relative_error(B.to_dense(), expected) < 1e-7
    with pytest.raises(RuntimeError, match='jvp="finite-difference"'):
        estimate(GaussNewton(), compiled, loss_fn, [(x, y)]).to_dense()
    z = model(x)
    expected = dense.gauss_newton(loss_fn(z, y), z, dense.trainable(model))
    G = estimate(GaussNewton(jvp="finite-difference"), compiled, loss_fn, [(x, y)])
    assert dense.relative_error(G.to_dense(), expected) < 1e-7


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_attention_multiplies_by_its_math_kernel(mode: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0, -1])

    model = cases.randomise(Attention().double())
    x = torch.randn(3, 5, 4, generator=cases.generator(), dtype=torch.float64)
    y, loss_fn = torch.tensor([0, 1, 2]), nn.CrossEntropyLoss()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = dense.hessian(loss_fn(model(x), y), dense.trainable(model))
    B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)])  # type: ignore[arg-type]
    assert dense.relative_error(B.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_activations_are_run_again_at_the_observed_parameters(mode: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(self.inner[:2], x, use_reentrant=False)
            return self.inner[2](h)

    model, loss_fn, x, y = case = cases.classification()
    expected = reference(case)
    B = estimate(Hessian(hvp=mode), Checkpointed(model), loss_fn, [(x, y)])  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert dense.relative_error(B.to_dense(), expected) < MODES[mode]


def test_unused_parameter_has_a_zero_block() -> None:
    model, loss_fn, x, y = cases.classification()
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    for mode in MODES:
        B = estimate(Hessian(hvp=mode), model, loss_fn, [(x, y)]).to_dense()  # type: ignore[arg-type]
        assert not B[:2].any()
        assert B[2:, 2:].any()


# -- in an optimizer's step --------------------------------------------------------------------------------------


def test_losses_of_several_backward_calls_add_up() -> None:
    model, loss_fn, x, y = case = cases.classification()
    params = dense.trainable(model)
    parts = ((x[:3], y[:3], 3 / 7), (x[3:], y[3:], 4 / 7))
    graphs = [LossGraph(share * loss_fn(model(a), b), params) for a, b, share in parts]
    estimator = Hessian()
    state = estimator.init(params)
    estimator.update(state, Observation(gradient=[None] * len(params), graphs=graphs, parameters=params))
    assert dense.relative_error(estimator.operator(state).to_dense(), reference(case)) < 1e-12


def test_outside_a_step_the_operator_names_the_remedy() -> None:
    estimator = Hessian()
    state = estimator.init([torch.zeros(2)])
    with pytest.raises(RuntimeError, match=r"optimizer\.backward"):
        estimator.operator(state)
    with pytest.raises(RuntimeError, match=r"optimizer\.backward"):
        estimator.update(state, Observation(gradient=[torch.zeros(2)]))
    assert TRANSIENT not in state


def test_finite_differences_take_the_closures_gradients() -> None:
    model, loss_fn, x, y = case = cases.classification()
    params = dense.trainable(model)

    def gradient_at(shift: list[Tensor]) -> list[Tensor]:
        moved = {n: p + s for (n, p), s in zip(model.named_parameters(), shift, strict=True)}
        loss = loss_fn(torch.func.functional_call(model, moved, (x,)), y)
        return list(torch.autograd.grad(loss, params))

    estimator = Hessian(hvp="finite-difference")
    state = estimator.init(params)
    seen = Observation(gradient=[None] * len(params), parameters=params)
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        estimator.update(state, seen)
    seen.gradient_at = gradient_at
    estimator.update(state, seen)
    assert (
        dense.relative_error(estimator.operator(state).to_dense(), reference(case))
        < MODES["finite-difference"]
    )


def test_forward_mode_in_an_optimizer_is_refused() -> None:
    model, loss_fn, x, y = cases.classification()
    params = dense.trainable(model)
    estimator = Hessian(hvp="forward")
    seen = Observation(gradient=[None] * len(params), graphs=[LossGraph(loss_fn(model(x), y), params)])
    with pytest.raises(ValueError, match='hvp="reverse"'):
        estimator.update(estimator.init(params), seen)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hvp must be one of 'reverse'.*got 'backward'"):
        Hessian(hvp="backward")  # type: ignore[arg-type]


# -- solve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 512])
def test_solve_inverts_an_indefinite_hessian(limit: int) -> None:
    model, loss_fn, x, y = case = cases.layer_norm()
    H = reference(case)
    damping = 0.05
    eigenvalues = torch.linalg.eigvalsh(H) + damping
    assert eigenvalues[0] < -0.01  # the premise: indefinite
    B = estimate(Hessian(), model, loss_fn, [(x, y)])
    B.dense_solve_limit = limit
    v = torch.randn(len(H), generator=cases.generator(), dtype=torch.float64)
    expected = torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), v)
    solved = flatten(B.solve(dense.split(v, dense.trainable(model)), damping))
    assert dense.relative_error(solved, expected) < 1e-8


@pytest.mark.parametrize("limit", [0, 512])
def test_singular_hessian_without_damping_is_refused_even_for_a_consistent_right_hand_side(
    limit: int,
) -> None:
    model, loss_fn, x, y = cases.classification()  # softmax ignores a common shift: singular
    B = estimate(Hessian(), model, loss_fn, [(x, y)])
    B.dense_solve_limit = limit
    v = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(ArithmeticError):
        B.solve(B.matvec(v))
    if limit:
        with pytest.raises(SingularCurvatureError):
            B.solve(B.matvec(v))


def test_negative_damping_is_refused() -> None:
    model, loss_fn, x, y = cases.classification()
    B = estimate(Hessian(), model, loss_fn, [(x, y)])
    with pytest.raises(ValueError, match=r"damping must be >= 0, got -0\.1"):
        B.solve([torch.ones_like(p) for p in model.parameters()], -0.1)
