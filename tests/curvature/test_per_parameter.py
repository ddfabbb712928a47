"""PerParameter: every part sees its own parameters only, alone and in an optimizer; B is block-diagonal."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import (
    KFAC,
    BlockOperator,
    DiagonalOperator,
    EmpiricalFisherDiagonal,
    FisherDiagonal,
    GaussNewton,
    GaussNewtonDiagonal,
    Hessian,
    HessianDiagonal,
    HutchinsonDiagonal,
    Identity,
    PerParameter,
    SingularCurvatureError,
    estimate,
)
from optimizers import SecondOrder
from tests.curvature import dense
from tests.curvature.cases import X, Y, seeded
from trust_region.registry import trust_regions


def network() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)))


def mixed(model: nn.Module) -> PerParameter:
    """A block of the exact Hessian, Gauss-Newton's for the head, diagonals elsewhere."""
    return PerParameter(
        [
            ("0.weight", Hessian()),
            (nn.LayerNorm, HessianDiagonal()),
            (lambda name, p, module: name.startswith("3"), GaussNewton()),
            ("*", EmpiricalFisherDiagonal()),
        ],
        model,
    )


def expected(model: nn.Module) -> Tensor:
    params = dense.trainable(model)
    z = model(X)
    loss = F.cross_entropy(z, Y)
    H, G = dense.hessian(loss, params), dense.gauss_newton(loss, z, params)
    g = dense.gradient(loss, params)
    B = torch.zeros_like(H)
    # 0.weight 12, 0.bias 4, norm 4 + 4, head 12 + 3
    B[:12, :12] = H[:12, :12]
    B[12:16, 12:16] = (g[12:16] ** 2).diag()
    B[16:24, 16:24] = H[16:24, 16:24].diagonal().diag()
    B[24:, 24:] = G[24:, 24:]
    return B


@pytest.mark.parametrize("parts", [[slice(None)], [slice(0, 2), slice(2, None)]], ids=["whole", "split"])
def test_blocks_are_those_of_the_parts(parts: list[slice]) -> None:
    model = network()
    batches = [(X[p], Y[p]) for p in parts]
    op = estimate(mixed(model), model, nn.CrossEntropyLoss(), batches)
    B = expected(model)
    torch.testing.assert_close(op.to_dense(), B, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(dense.flat(op.diagonal()), B.diagonal(), rtol=1e-7, atol=1e-10)
    v = torch.arange(39, dtype=torch.float64)
    params = dense.trainable(model)
    torch.testing.assert_close(dense.flat(op.matvec(dense.split(v, params))), B @ v, rtol=1e-7, atol=1e-9)
    solved = dense.flat(op.solve(dense.split(v, params), 2.0))
    torch.testing.assert_close((B + 2.0 * torch.eye(39)) @ solved, v, rtol=1e-5, atol=1e-5)


def test_weight_and_bias_with_the_same_estimator_object_are_one_block() -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 3)))
    kfac = KFAC(model)
    rules = [("0.weight", kfac), ("0.bias", kfac)]
    found = estimate(PerParameter(rules), model, nn.CrossEntropyLoss(), [(X, Y)]).to_dense()
    torch.testing.assert_close(found, estimate(kfac, model, nn.CrossEntropyLoss(), [(X, Y)]).to_dense())
    assert bool((found[:9, 9:] != 0).any())


def test_default_rules_are_kfac_for_matrices_and_the_empirical_fisher_for_the_rest() -> None:
    model = network()
    found = estimate(PerParameter(model=model), model, nn.CrossEntropyLoss(), [(X, Y)]).to_dense()
    kfac = estimate(KFAC(model, exclude=["1"]), model, nn.CrossEntropyLoss(), [(X, Y)]).to_dense()
    g = dense.gradient(F.cross_entropy(model(X), Y), dense.trainable(model))
    torch.testing.assert_close(found[:16, :16], kfac[:16, :16])
    torch.testing.assert_close(found[24:, 24:], kfac[24:, 24:])
    torch.testing.assert_close(found[16:24, 16:24], (g[16:24] ** 2).diag())


def train(model: nn.Module, optimizer: SecondOrder, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        z = model(X)
        loss = F.cross_entropy(z, Y)
        optimizer.backward(loss, z)
        optimizer.step(loss=loss)


def compose(model: nn.Module) -> SecondOrder:
    rules: list[tuple[Any, Any]] = [
        ("0.*", HutchinsonDiagonal(interval=2)),
        ("1.*", Identity()),
        ("3.weight", FisherDiagonal("categorical", interval=3)),
        ("*", GaussNewtonDiagonal(model)),
    ]
    return SecondOrder(
        model.parameters(),
        lr=0.5,
        curvature=PerParameter(rules, model),
        trust_region=trust_regions["unbounded"](damping=5.0),
    )


def test_parts_with_intervals_of_their_own_train_save_and_resume() -> None:
    model = network()
    optimizer = compose(model)
    before = float(F.cross_entropy(model(X), Y).detach())
    train(model, optimizer, 4)
    other = network()
    resumed = compose(other)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 5)
    train(other, resumed, 5)
    assert float(F.cross_entropy(model(X), Y).detach()) < before
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_deep_copy_goes_on_by_itself() -> None:
    model = network()
    optimizer = compose(model)
    train(model, optimizer, 2)
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(model_2, optimizer_2, 3)
    for p, q in zip(model.parameters(), model_2.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_a_part_lies_with_its_own_parameters() -> None:
    model = network()
    state = mixed(model).init(list(model.parameters()))
    held = state["1.diagonal"]
    assert [x.numel() for x in held] == [0, 0, 4, 4, 0, 0]  # type: ignore[union-attr]


def test_a_parameter_that_no_rule_fits_is_named() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"no rule fits parameter '0\.bias'"):
        estimate(PerParameter([("*weight", Identity())]), model, nn.CrossEntropyLoss(), [(X, Y)])


def test_missing_model_rules_and_foreign_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="rules"):
        PerParameter()
    with pytest.raises(ValueError, match="model=model"):
        PerParameter([("*", Identity())]).init([torch.zeros(1)])
    with pytest.raises(ValueError, match="not in it"):
        PerParameter([("*", Identity())], network()).init([torch.zeros(1)])


def test_block_operator_refuses_parts_that_overlap_or_leave_out() -> None:
    like = [torch.zeros(1), torch.zeros(1)]
    one = DiagonalOperator([torch.ones(1)])
    for parts in ([([0], one)], [([0], one), ([0], one)], [([0], one), ([2], one)]):
        with pytest.raises(ValueError, match="each of the 2 parameters once"):
            BlockOperator(like, parts)


def test_block_operator_keeps_the_widest_dtype_and_takes_empty_parameters() -> None:
    like = [torch.zeros(1), torch.zeros(0), torch.zeros(1, dtype=torch.float64)]
    wide = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    op = BlockOperator(
        like,
        [
            ([0], DiagonalOperator([torch.ones(1)])),
            ([1], DiagonalOperator([torch.ones(0)])),
            ([2], DiagonalOperator([wide])),
        ],
    )
    assert op.to_dense()[1, 1] == wide


@pytest.mark.parametrize("rule", ["1.weight", "head.weight", nn.Linear])
def test_a_shared_parameter_goes_by_every_name_it_has(rule: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(3, 3), nn.Linear(3, 3, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    model = (
        seeded(Tied()) if rule != "1.weight" else seeded(nn.Sequential(*[nn.Linear(3, 3, bias=False)] * 2))
    )
    found = PerParameter([(rule, HessianDiagonal()), ("*", Identity())], model).assign(
        model, list(model.parameters())
    )
    assert found == [0]


def test_a_name_that_no_parameter_has_is_refused_with_the_nearest() -> None:
    model = network()
    for rules in ([("0.wieght", Hessian()), ("*", Identity())], [("*", Identity()), ("9.bias", Identity())]):
        with pytest.raises(
            ValueError, match=r"names no parameter of the model \(the nearest is '[03].(weight|bias)'"
        ):
            estimate(PerParameter(rules), model, nn.CrossEntropyLoss(), [(X, Y)])
    # a pattern may fit nothing: rules serve several models
    estimate(
        PerParameter([("*.gamma", Hessian()), ("*", Identity())]), model, nn.CrossEntropyLoss(), [(X, Y)]
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*": Identity()}, r"\(rule, estimator\) pairs, got '\*' at position 0"),
        ([("*",)], r"\(rule, estimator\) pairs, got \('\*',\) at position 0"),
        (["*", Identity()], r"\(rule, estimator\) pairs, got '\*'"),
        ([(3, Identity())], "a rule must be a pattern, .* got 3"),
        ([((nn.Linear, "x"), Identity())], "a rule must be a pattern"),
        ([("*", Identity)], r"an estimator, such as Identity\(\), got the class Identity"),
        ([("*", "kfac")], "an estimator, .* got 'kfac'"),
    ],
)
def test_rules_that_are_none_are_named(rules: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PerParameter(rules)


def test_a_part_takes_finite_differences_in_the_closure() -> None:
    found = []
    for hessian in (Hessian(hvp="finite-difference"), Hessian()):
        model = network()
        rules: list[tuple[Any, Any]] = [("0.*", hessian), ("*", Identity())]
        optimizer = SecondOrder(
            model.parameters(),
            lr=0.5,
            curvature=PerParameter(rules, model),
            trust_region=trust_regions["unbounded"](damping=5.0),
        )

        def closure(model: nn.Module = model, optimizer: SecondOrder = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            optimizer.backward(loss)
            return loss

        for _ in range(3):
            optimizer.step(closure)
        found.append(dense.flat(list(model.parameters())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-8)


def test_a_singular_block_raises() -> None:
    op = BlockOperator([torch.zeros(1)], [([0], DiagonalOperator([torch.zeros(1)]))])
    with pytest.raises(SingularCurvatureError):
        op.solve([torch.ones(1)], 0.0)
