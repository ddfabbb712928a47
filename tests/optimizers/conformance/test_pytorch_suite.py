"""PyTorch's optimizer suite over every registered preset, its checks by name (``test/test_optim.py``): steps."""
# ruff: noqa: PT009, PT027  (PyTorch's suite is built on unittest, whose comparisons know tensors)

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase

from curvature.protocols import Needs
from tests.optimizers.conformance.infos import (
    DB,
    GRADIENT_ONLY,
    Affine,
    climbs,
    closure_of,
    loss_of,
    numbers,
    steps,
)

SCHEDULERS = (
    [lambda o: StepLR(o, step_size=3, gamma=0.9)],
    [lambda o: LinearLR(o, start_factor=0.4, total_iters=4), lambda o: ExponentialLR(o, gamma=0.99)],
    [lambda o: StepLR(o, step_size=3, gamma=0.9), lambda o: ReduceLROnPlateau(o)],
)


class TestOptimRenewed(TestCase):
    def setUp(self) -> None:
        super().setUp()
        warnings.simplefilter("ignore", UserWarning)  # steps without a loss say so once

    @optims(DB)
    def test_optimizer_can_be_printed(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            text = repr(optim_info.optim_cls(Affine(device=device), **given.kwargs))
            self.assertIn("Parameter Group 0", text)
            self.assertIn("lr", text)

    @optims(DB)
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            self.assertEqual(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)

            def construct(given: Any = given) -> None:
                if given.params is None:
                    optim_info.optim_cls(Affine(device=device), **given.kwargs)
                else:
                    optim_info.optim_cls.of_params(given.params, **given.kwargs)

            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    construct()
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    construct()

    @optims(DB)
    def test_forloop_goes_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for contiguous in (True, False):
            for given in optim_info.optim_inputs_func(device=device):
                model = Affine(dtype, contiguous, device)
                optimizer = optim_info.optim_cls(model, **given.kwargs)
                first = loss_of(model)[0].item()
                steps(model, optimizer, 12)
                last = loss_of(model)[0].item()
                if given.kwargs.get("maximize"):
                    self.assertGreater(last, first, given.desc)
                else:
                    self.assertLess(last, first, given.desc)

    @optims(DB)
    def test_param_group_with_lrscheduler_goes_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for makers in SCHEDULERS:
            model = Affine(dtype, device=device)
            given = optim_info.optim_inputs_func(device=device)[0]
            if optim_info.supports_param_groups:
                lr = given.kwargs.get("lr", optim_info.optim_cls(model).defaults["lr"])
                groups = [{"params": [model.linear.weight]}, {"params": [model.linear.bias], "lr": lr / 2}]
                optimizer = optim_info.optim_cls.of_params(groups, **given.kwargs)
            else:
                optimizer = optim_info.optim_cls(model, **given.kwargs)
            schedulers = [make(optimizer) for make in makers]
            first = loss_of(model)[0].item()
            closure = closure_of(model, optimizer)
            for _ in range(10):
                loss = optimizer.step(closure)
                for scheduler in schedulers:
                    scheduler.step(loss.detach()) if isinstance(
                        scheduler, ReduceLROnPlateau
                    ) else scheduler.step()
            self.assertLess(loss_of(model)[0].item(), first)

    @optims(DB)
    def test_tensor_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        given = optim_info.optim_inputs_func(device=device)[0]
        lr = given.kwargs.get("lr", optim_info.optim_cls(Affine()).defaults["lr"])
        for tensor in (torch.tensor(lr), torch.tensor([lr])):
            plain, tensored = Affine(dtype, device=device), Affine(dtype, device=device)
            a = optim_info.optim_cls(plain, **{**given.kwargs, "lr": lr})
            b = optim_info.optim_cls(tensored, **{**given.kwargs, "lr": tensor})
            scheduler = ExponentialLR(b, gamma=0.5)
            for t in range(4):
                a.param_groups[0]["lr"] = lr * 0.5**t
                steps(plain, a, 1)
                steps(tensored, b, 1)
                scheduler.step()
            self.assertEqual(numbers(plain), numbers(tensored))
            self.assertIsInstance(b.param_groups[0]["lr"], torch.Tensor)

    @optims([i for i in DB if i.supports_param_groups])
    def test_param_groups_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A group with lr 0 stands still while the other moves."""
        model = Affine(dtype, device=device)
        groups = [{"params": [model.linear.weight]}, {"params": [model.linear.bias], "lr": 0.0}]
        optimizer = optim_info.optim_cls.of_params(groups)
        weight, bias = numbers(model)
        steps(model, optimizer, 3)
        self.assertEqual(model.linear.bias, bias, rtol=0, atol=0)
        self.assertNotEqual(model.linear.weight, weight)

    @optims([i for i in GRADIENT_ONLY if i.supports_param_groups and i.optim_cls.decays])
    def test_param_groups_weight_decay(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """A group with weight decay and a zero gradient shrinks by ηλ; the other stands still."""
        model = Affine(dtype, device=device)
        groups = [
            {"params": [model.linear.weight], "weight_decay": 0.5},
            {"params": [model.linear.bias], "weight_decay": 0.0},
        ]
        optimizer = optim_info.optim_cls.of_params(groups, lr=0.1)
        weight, bias = numbers(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        self.assertEqual(model.linear.weight, weight * (1 - 0.1 * 0.5))
        self.assertEqual(model.linear.bias, bias)

    @optims([i for i in DB if not climbs(i.optim_cls(Affine()))])
    def test_maximize_is_refused(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Where it can be meant it is among the inputs of test_forloop_goes_right_direction."""
        model = Affine(dtype, device=device)
        with self.assertRaisesRegex((ValueError, TypeError), "maximize"):
            optim_info.optim_cls(model, maximize=True)

    @optims([i for i in DB if i.supports_param_groups])
    def test_complex_is_refused(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        with self.assertRaisesRegex(ValueError, "complex"):
            optim_info.optim_cls.of_params([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])

    @optims([i for i in DB if i.supports_param_groups and not i.step_requires_closure])
    def test_sparse_is_refused(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        p = nn.Parameter(torch.ones(2, 2))
        optimizer = optim_info.optim_cls.of_params([p])
        p.grad = torch.eye(2).to_sparse()
        with self.assertRaisesRegex(RuntimeError, "sparse"):
            optimizer.step()

    @optims([i for i in GRADIENT_ONLY if i.supports_param_groups])
    def test_mixed_device_dtype(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Parameters of four dtypes in one optimizer: each moves as it does in float64, to its own precision."""

        def moved(dtypes: list[torch.dtype]) -> list[torch.Tensor]:
            generator = torch.Generator().manual_seed(3)
            params = [nn.Parameter(torch.rand(3, 3, generator=generator).to(d)) for d in dtypes]
            optimizer = optim_info.optim_cls.of_params(params, lr=1e-2)
            for _ in range(3):
                for p in params:
                    p.grad = torch.rand(3, 3, generator=generator).to(p.dtype)
                optimizer.step(loss=1.0)
            for p in params:
                self.assertTrue(
                    all(
                        not x.is_floating_point() or x.dtype in (torch.float32, torch.float64)
                        for x in optimizer.state[p].values()
                        if isinstance(x, torch.Tensor)
                    )
                )
            return [p.detach().double() for p in params]

        mixed = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
        for a, b, d in zip(moved(mixed), moved([torch.float64] * 4), mixed, strict=True):
            eps = torch.finfo(d).eps
            self.assertEqual(a, b, rtol=0, atol=8 * eps + 1e-3)

    @optims(DB)
    def test_foreach_matches_forloop(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """The step's list operations against the same operations one tensor at a time: seven steps, of which one has no
        gradients at all and two have none for a layer that is frozen meanwhile."""
        model, other = Affine(torch.float64, device=device), Affine(torch.float64, device=device)
        optimizer, looped = optim_info.optim_cls(model), optim_info.optim_cls(other)
        for t in range(7):
            for m, o, context in ((model, optimizer, nullcontext()), (other, looped, one_tensor_at_a_time())):
                m.linear.bias.requires_grad_(t not in (3, 4))
                with context:
                    if t == 2:
                        o.zero_grad()
                        if not optim_info.step_requires_closure:
                            o.step()
                    else:
                        steps(m, o, 1)
            self.assertEqual(numbers(model), numbers(other), rtol=1e-10, atol=1e-12)
            self.assertEqual(optimizer.state_dict(), looped.state_dict(), rtol=1e-9, atol=1e-11)

    @optims([i for i in DB if not i.step_requires_closure])
    def test_step_is_noop_when_params_have_no_grad(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        before, state = numbers(model), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        self.assertEqual(before, numbers(model), rtol=0, atol=0)
        self.assertEqual(state, optimizer.state_dict())

    @optims(DB)
    def test_step_is_noop_for_zero_grads(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = numbers(model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss, outputs = loss_of(model)
            loss = 0.0 * loss
            optimizer.backward(loss, outputs)
            return loss

        optimizer.step(closure)
        self.assertEqual(before, numbers(model), rtol=0, atol=0)

    @optims([i for i in DB if not i.step_requires_closure])
    def test_step_with_lr_zero_is_harmless(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Distributed checkpoints initialise an optimizer by such a step."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = numbers(model)
        steps(model, optimizer, 1)
        self.assertEqual(before, numbers(model), rtol=0, atol=0)

    @optims(DB)
    def test_step_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """test_step_pre_hook, test_step_post_hook and test_step_all_hooks."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        called: list[str] = []

        def hook(name: str) -> Any:
            return lambda o, args, kwargs: called.append(name)

        handles = [
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
            optimizer.register_step_pre_hook(hook("pre")),
            optimizer.register_step_post_hook(hook("post")),
        ]
        steps(model, optimizer, 1)
        for handle in handles:
            handle.remove()
        steps(model, optimizer, 1)
        self.assertEqual(called, ["global pre", "pre", "post", "global post"])

    @optims([i for i in DB if i.supports_param_groups])
    def test_can_step_after_add_param_group(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls.of_params([model.linear.weight])
        steps(model, optimizer, 2)
        count = float(optimizer.state[model.linear.weight]["step"])
        optimizer.add_param_group({"params": [model.linear.bias]})
        before = numbers(model)
        steps(model, optimizer, 2)
        self.assertEqual(float(optimizer.state[model.linear.weight]["step"]), count + 2)
        self.assertEqual(float(optimizer.state[model.linear.bias]["step"]), 2)
        self.assertNotEqual(model.linear.bias, before[1])

    @optims(DB)
    def test_default_dtype_does_not_matter(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """test_set_default_dtype_works_with_foreach."""
        results = []
        for default in (torch.float32, torch.float64):
            before = torch.get_default_dtype()
            torch.set_default_dtype(default)
            try:
                model = Affine(dtype, device=device)
                steps(model, optim_info.optim_cls(model), 3)
            finally:
                torch.set_default_dtype(before)
            results.append(numbers(model))
        self.assertEqual(results[0][0].dtype, dtype)
        self.assertEqual([x.shape for x in results[0]], [x.shape for x in results[1]])

    @optims(DB)
    def test_global_random_state_is_untouched(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        before = torch.get_rng_state()
        steps(model, optim_info.optim_cls(model), 2)
        self.assertEqual(before, torch.get_rng_state())

    @optims([i for i in DB if Needs.LOSS in i.optim_cls(Affine()).needs])
    def test_nan_loss_and_gradient_change_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        self.check_bad_gradient(optim_info, device, dtype)

    @optims([i for i in DB if Needs.LOSS not in i.optim_cls(Affine()).needs])
    def test_nan_gradient_changes_nothing(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        self.check_bad_gradient(optim_info, device, dtype)

    def check_bad_gradient(self, optim_info: OptimizerInfo, device: str, dtype: torch.dtype) -> None:
        for bad in (float("nan"), float("inf")):
            model = Affine(dtype, device=device)
            optimizer = optim_info.optim_cls(model)
            steps(model, optimizer, 2)
            before, state = numbers(model), copy.deepcopy(optimizer.state_dict()["state"])
            good = closure_of(model, optimizer)

            def closure(bad: float = bad, model: Affine = model, good: Any = good) -> torch.Tensor:
                loss = good()
                model.linear.weight.grad[0, 0] = bad
                return loss * bad

            optimizer.step(closure)
            self.assertEqual(before, numbers(model), rtol=0, atol=0)
            state[0]["skipped_steps"] += 1
            self.assertEqual(state, optimizer.state_dict()["state"], rtol=0, atol=0)
            self.assertEqual(float(optimizer.step_info.skipped_steps), 1)


class one_tensor_at_a_time:  # noqa: N801
    """Every ``torch._foreach_`` function replaced by a loop over the ordinary one."""

    def __enter__(self) -> None:
        self.kept = {n: getattr(torch, n) for n in dir(torch) if n.startswith("_foreach_")}
        for name, function in self.kept.items():
            setattr(torch, name, self.looped(function))

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(torch, name, function)

    @staticmethod
    def looped(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            n = len(args[0])

            def pick(a: Any, i: int) -> Any:
                return [a[i]] if isinstance(a, (list, tuple)) and len(a) == n else a

            results = [
                function(*(pick(a, i) for a in args), **{k: pick(v, i) for k, v in kwargs.items()})
                for i in range(n)
            ]
            return None if not results or results[0] is None else [r[0] for r in results]

        return run


instantiate_device_type_tests(TestOptimRenewed, globals(), only_for=("cpu", "cuda"))
