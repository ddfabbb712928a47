"""The native step's numbers on the host: the policy's own rule, and few operations whatever the number of tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import SOAA
from optimizers.compiled.host_path import Numbers, rule_of
from optimizers.compiled.native import NativePasses
from trust_region import LevenbergMarquardt, Proposal, RmsBox, SOAARadius, TrustRegion

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("total_steps", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rule_in_numbers_is_the_policys_own(dtype: torch.dtype, total_steps: int | None) -> None:
    policy = SOAARadius(total_steps=total_steps)
    region = TrustRegion(radius=policy)
    plain = policy.init([torch.zeros(2, dtype=dtype)])
    host = copy.deepcopy(plain)
    numbers = Numbers(host, torch.zeros(()))
    rule = rule_of(region)
    losses = [3.0, 2.9, None, 2.0, NAN, 2.5, INF, 1e30, -4.0, 0.0, 1e-30, 5.0]
    promises = [0.1, 0.0, 0.4, 1e-12, 0.2, -0.3, 0.1, 1e-9, NAN, INF, 0.3, 0.2]
    for loss, promised in zip(losses, promises, strict=True):
        given = None if loss is None else torch.tensor(loss, dtype=dtype)
        P = torch.tensor(promised, dtype=dtype)
        wanted = policy.review(plain, Proposal([], P, P, P > 0, [P]), given)
        found = rule(numbers, loss, promised)
        rel = 1e-12 if dtype == torch.float64 else 1e-4
        assert found.ratio == pytest.approx(float(wanted.ratio), rel=rel, nan_ok=True)
        if wanted.actual_reduction is not None:
            assert found.actual_reduction == pytest.approx(
                float(wanted.actual_reduction), rel=rel, abs=1e-5, nan_ok=True
            )
        for name, value in plain.items():
            assert float(host[name]) == pytest.approx(float(value), rel=rel, abs=1e-12), name


def test_policies_without_a_rule_in_numbers_are_refused() -> None:
    for policy, region in (
        (SOAARadius(scope="tensor"), RmsBox(scope="tensor")),
        (LevenbergMarquardt(), None),
    ):
        with pytest.raises(TypeError, match="has no rule in numbers"):
            rule_of(TrustRegion(region=region, radius=policy))


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def with_gradients(number: int) -> list[Tensor]:
    params = [nn.Parameter(torch.randn(5)) for _ in range(number)]
    for p in params:
        p.grad = torch.randn(5)
    return list(params)


@pytest.mark.parametrize("number", [1, 40])
def test_a_native_step_is_a_handful_of_operations_whatever_the_number_of_tensors(number: int) -> None:
    params = with_gradients(number)
    optimizer = SOAA(params, compile=True, total_steps=10)
    optimizer.step(loss=torch.tensor(1.0))
    if not isinstance(optimizer._paths._path.passes, NativePasses):
        pytest.skip("no C++ compiler")
    with Operations() as operations:
        optimizer.step(loss=torch.tensor(0.9))
    assert operations.count <= 9
