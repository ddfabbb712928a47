"""PyTorch's optimizer suite over every registered preset: flags, groups, hooks, closures, odd tensors, pickles."""
# ruff: noqa: PT009, PT027  (PyTorch's suite is built on unittest, whose comparisons know tensors)

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase

from optimizers.compiled.captured_path import why_not
from tests.optimizers.conformance.infos import (
    DB,
    GRADIENT_ONLY,
    Affine,
    closure_of,
    loss_of,
    numbers,
    steps,
)

WITH_GROUPS = [i for i in DB if i.supports_param_groups]
#: (flag, what asks for the step's own way, what asks for another)
FLAGS = [
    ("foreach", True, False),
    ("fused", False, True),
    ("capturable", False, True),
    ("differentiable", False, True),
]


class TestOptimInterface(TestCase):
    def setUp(self) -> None:
        super().setUp()
        warnings.simplefilter("ignore", UserWarning)  # steps without a loss say so once

    # -- gradients and counters -----------------------------------------------------------------------------------

    @optims(DB)
    def test_grads_are_never_inplaced_into(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Not even to be put back: by the counter that every in-place operation moves."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        for _ in range(2):
            seen: list[tuple[torch.Tensor, int]] = []

            def closure(seen: list[tuple[torch.Tensor, int]] = seen) -> torch.Tensor:
                optimizer.zero_grad()
                loss, outputs = loss_of(model)
                optimizer.backward(loss, outputs)
                if not seen:  # the first evaluation's, before a trial
                    seen += [(p.grad, p.grad._version) for p in model.parameters()]
                return loss

            optimizer.step(closure)
            self.assertEqual(len(seen), 2)
            for p, (gradient, version) in zip(model.parameters(), seen, strict=True):
                self.assertIs(p.grad, gradient)
                self.assertEqual(gradient._version, version)

    @optims(GRADIENT_ONLY)
    def test_step_iteration(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A parameter's counter moves by one a step in which it has a gradient."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 2)
        model.linear.bias.requires_grad_(False)
        model.linear.bias.grad = None
        steps(model, optimizer, 3)
        found = [float(optimizer.state[p]["step"]) for p in model.parameters()]
        self.assertEqual(found, [5.0, 2.0])

    # -- flags ----------------------------------------------------------------------------------------------------

    @optims(DB)
    def test_flags_of_torch(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """What asks for the step's own way changes nothing; another way is refused, with what to do instead."""
        plain = Affine(dtype, device=device)
        reference = optim_info.optim_cls(plain)
        steps(plain, reference, 2)
        for value in (0, 1):
            model = Affine(dtype, device=device)
            optimizer = optim_info.optim_cls(model, **{flag: (None, own)[value] for flag, own, _ in FLAGS})
            self.assertFalse(optimizer.capturable)
            self.assertEqual(set(optimizer.defaults), set(reference.defaults))
            steps(model, optimizer, 2)
            self.assertEqual(numbers(model), numbers(plain), rtol=0, atol=0)
        for flag, _, other in FLAGS:
            if flag == "capturable" and why_not(reference._composition()) is None:
                self.assertTrue(optim_info.optim_cls(Affine(device=device), capturable=True).capturable)
            else:
                with self.assertRaisesRegex(ValueError, f"^{flag}={other} is not supported: .* (leave|use) "):
                    optim_info.optim_cls(Affine(device=device), **{flag: other})
            with self.assertRaisesRegex(ValueError, f"^{flag} must be a bool or None, got 'yes'"):
                optim_info.optim_cls(Affine(device=device), **{flag: "yes"})

    @optims(WITH_GROUPS)
    def test_flags_of_groups(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for flag, own, other in FLAGS:
            p = nn.Parameter(torch.ones(2, 2, device=device))
            optim_info.optim_cls.of_params([{"params": [p], flag: own}])
            with self.assertRaisesRegex(ValueError, f"{flag}={other} is not supported"):
                optim_info.optim_cls.of_params([{"params": [p], flag: other}])

    @optims(DB)
    def test_unknown_option_is_refused(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        with self.assertRaisesRegex(TypeError, "amsgrad"):
            optim_info.optim_cls(Affine(device=device), amsgrad=True)
        if optim_info.supports_param_groups:
            with self.assertRaisesRegex(TypeError, "amsgrad"):
                optim_info.optim_cls.of_params([nn.Parameter(torch.ones(2, 2))], amsgrad=True)

    # -- groups ---------------------------------------------------------------------------------------------------

    @optims(WITH_GROUPS)
    def test_add_param_group_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A group that is refused leaves the optimizer as it was."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls.of_params([model.linear.weight])
        steps(model, optimizer, 1)
        bias = model.linear.bias
        cases: list[tuple[Any, type[Exception], str]] = [
            ([bias], TypeError, "param_group must be a dict"),
            ({"params": {bias}}, TypeError, "ordered collections"),
            ({"params": ["bias"]}, TypeError, "can only optimize Tensors"),
            ({"params": [bias * 2]}, ValueError, "non-leaf"),
            ({"params": [model.linear.weight]}, ValueError, "more than one parameter group"),
            ({"params": [("bias", bias)]}, ValueError, "with/without names"),
            ({"params": [bias], "lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
            ({"params": [bias], "momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
            ({"params": [bias], "weight_decay": -0.1}, ValueError, "weight_decay must be >= 0, got -0.1"),
            ({"params": [torch.ones(2, dtype=torch.complex64, device=device)]}, ValueError, "view_as_real"),
            ({"params": [torch.ones(2, dtype=torch.int64, device=device)]}, ValueError, "floating point"),
        ]
        before = copy.deepcopy(optimizer.state_dict())
        for group, error, message in cases:
            with self.assertRaisesRegex(error, message):
                optimizer.add_param_group(group)
            self.assertEqual(before, optimizer.state_dict(), rtol=0, atol=0)
            self.assertEqual({id(p) for p in optimizer.state}, {id(model.linear.weight)})
        with self.assertWarnsRegex(UserWarning, "duplicate parameters"), warnings.catch_warnings():
            warnings.simplefilter("always")
            optim_info.optim_cls.of_params([bias, bias])
        steps(model, optimizer, 1)

    @optims(WITH_GROUPS)
    def test_named_parameters(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Names stand in the groups and the state_dict, and the steps are those without them."""
        model, plain = Affine(dtype, device=device), Affine(dtype, device=device)
        named = optim_info.optim_cls.of_params(model.named_parameters())
        reference = optim_info.optim_cls.of_params(plain.parameters())
        steps(model, named, 3)
        steps(plain, reference, 3)
        self.assertEqual(numbers(model), numbers(plain), rtol=0, atol=0)
        self.assertEqual(
            named.state_dict()["param_groups"][0]["param_names"], ["linear.weight", "linear.bias"]
        )
        twin = copy.deepcopy(named)
        self.assertEqual(twin.param_groups[0]["param_names"], ["linear.weight", "linear.bias"])
        with self.assertRaisesRegex(ValueError, "with/without names"):
            optim_info.optim_cls.of_params([("weight", plain.linear.weight), plain.linear.bias])

    # -- gradients and tensors ------------------------------------------------------------------------------------

    @optims([i for i in WITH_GROUPS if not i.step_requires_closure])
    def test_empty_and_scalar_tensors(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Parameters without elements, and 0-d ones, beside ordinary ones."""
        model = Affine(dtype, device=device)
        empty = nn.Parameter(torch.empty(0, 3, dtype=dtype, device=device))
        scalar = nn.Parameter(torch.ones((), dtype=dtype, device=device))
        optimizer = optim_info.optim_cls.of_params([empty, *model.parameters(), scalar])
        first = loss_of(model)[0].item()
        for _ in range(5):
            optimizer.zero_grad()
            outputs = model(model.x) * scalar
            loss = nn.functional.cross_entropy(outputs, model.y) + empty.sum()
            optimizer.backward(loss, outputs)
            optimizer.step()
        self.assertLess(loss_of(model)[0].item(), first)
        self.assertNotEqual(scalar.item(), 1.0)
        self.assertTrue(all(bool(torch.isfinite(p).all()) for p in (*model.parameters(), scalar)))
        again = optim_info.optim_cls.of_params([empty, *model.parameters(), scalar])
        again.load_state_dict(optimizer.state_dict())

    @optims([i for i in GRADIENT_ONLY if i.supports_param_groups])
    def test_non_contiguous_gradients(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """The layout of parameters and gradients does not enter the numbers."""
        generator = torch.Generator().manual_seed(0)
        # Square, so that one gradient fills every Kronecker factor: an eigenbasis is then unique.
        values = [
            torch.randn(4, 4, 2, generator=generator, dtype=torch.float64),
            torch.randn(3, 2, generator=generator, dtype=torch.float64),
        ]
        plain = [nn.Parameter(x[..., 0].contiguous().to(device)) for x in values]
        odd = [nn.Parameter(x.to(device)[..., 0]) for x in values]
        self.assertFalse(any(q.is_contiguous() for q in odd))
        a, b = optim_info.optim_cls.of_params(plain), optim_info.optim_cls.of_params(odd)
        for _ in range(4):
            for p, q in zip(plain, odd, strict=True):
                g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device)
                p.grad, q.grad = g, g.mT.contiguous().mT if g.dim() > 1 else g.repeat_interleave(2)[::2]
            a.step(loss=1.0)
            b.step(loss=1.0)
        self.assertEqual([p.detach() for p in plain], [q.detach() for q in odd], rtol=1e-9, atol=1e-10)

    @optims(GRADIENT_ONLY)
    def test_does_not_step_if_foundinf(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """test_fused_does_not_step_if_foundinf: the scaler's word is enough, whatever the gradients are."""
        for scale in (None, torch.ones((), device=device)):
            model = Affine(dtype, device=device)
            optimizer: Any = optim_info.optim_cls(model)
            before, state = numbers(model), copy.deepcopy(optimizer.state_dict()["state"])
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.grad_scale, optimizer.found_inf = scale, torch.ones((), device=device)
            optimizer.step(loss=1.0)
            self.assertEqual(before, numbers(model), rtol=0, atol=0)
            state[0]["skipped_steps"] += 1
            self.assertEqual(state, optimizer.state_dict()["state"], rtol=0, atol=0)
            optimizer.found_inf = torch.zeros((), device=device)
            optimizer.step(loss=1.0)
            self.assertNotEqual(before, numbers(model))

    # -- closures -------------------------------------------------------------------------------------------------

    @optims(DB)
    def test_closure_semantics(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Called with gradients enabled, once (twice where a trial is judged); ``step`` returns its first value."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        evaluate, calls, losses = closure_of(model, optimizer), [], []

        def closure() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            losses.append(evaluate())
            return losses[-1]

        with torch.no_grad():
            returned = optimizer.step(closure)
        self.assertIs(returned, losses[0])
        self.assertTrue(calls[0])
        self.assertEqual(len(calls), 2 if optim_info.step_requires_closure else 1)
        self.assertTrue(returned.requires_grad)
        if not optim_info.step_requires_closure:
            evaluate()
            self.assertIsNone(optimizer.step())

    @optims([i for i in DB if i.step_requires_closure])
    def test_second_order_optims_return_consistent_types(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Accepted, rejected, or at a stationary point: ``step`` returns what the closure gave."""
        seen = {}
        for kind in ("accepted", "rejected", "stationary"):
            model = Affine(dtype, device=device)
            optimizer = optim_info.optim_cls(model)
            evaluate, calls = closure_of(model, optimizer), []

            def closure(kind: str = kind, calls: list[int] = calls, evaluate: Any = evaluate) -> torch.Tensor:
                calls.append(1)
                loss = evaluate()
                if kind == "stationary":
                    for p in model.parameters():  # noqa: B023
                        p.grad.zero_() if p.grad is not None else None
                return loss + (100.0 if kind == "rejected" and len(calls) > 1 else 0.0)

            returned = optimizer.step(closure)
            seen[kind] = (type(returned), returned.shape)
        self.assertEqual(len(set(seen.values())), 1)

    # -- hooks, copies, profiler ----------------------------------------------------------------------------------

    @optims(DB)
    def test_state_dict_pre_and_post_hook(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """test_state_dict_pre_hook, _post_hook and _pre_post_hook: what the first writes the second may take out."""
        optimizer: Any = optim_info.optim_cls(Affine(dtype, device=device))

        def post(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "saw": state_dict["state"].pop("test", None)}

        handle = optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", 1))
        self.assertEqual(optimizer.state_dict()["state"]["test"], 1)
        optimizer.register_state_dict_post_hook(post)
        found = optimizer.state_dict()
        self.assertEqual(found["saw"], 1)
        self.assertNotIn("test", found["state"])
        handle.remove()
        del optimizer.state["test"]
        self.assertIsNone(optimizer.state_dict()["saw"])

    @optims(DB)
    def test_load_state_dict_hooks_and_prepend(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """test_load_state_dict_pre_hook_and_prepend, _post_hook and _pre_post_hook."""
        optimizer: Any = optim_info.optim_cls(Affine(dtype, device=device))
        saved = optimizer.state_dict()

        def in_place(o: Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict["param_groups"][0]["lr"] = 0.002

        def replaced(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            mine = copy.deepcopy(state_dict)
            mine["param_groups"][0]["lr"] = 0.003
            return mine

        optimizer.register_load_state_dict_pre_hook(in_place)
        optimizer.load_state_dict(copy.deepcopy(saved))
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)
        optimizer.register_load_state_dict_pre_hook(replaced, prepend=True)
        optimizer.load_state_dict(copy.deepcopy(saved))
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.002)  # prepended: the other had the last word
        seen: list[Any] = []
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
        handle = optimizer.register_load_state_dict_pre_hook(replaced)
        optimizer.load_state_dict(copy.deepcopy(saved))
        handle.remove()
        self.assertEqual(seen, [0.003])

    @optims(DB)
    def test_older_pickle(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """``__setstate__`` of a version that knew fewer attributes and options of groups."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 2)
        older = copy.deepcopy(optimizer.__getstate__())
        for name in ("compile", "process_group", "_built_for"):
            del older[name]
        for group in older["param_groups"]:
            del group["maximize"], group["weight_decay"]
        twin = type(optimizer).__new__(type(optimizer))
        twin.__setstate__(pickle.loads(pickle.dumps(older)))
        self.assertEqual(twin.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
        twin.zero_grad()
        if not optimizer.needs.graph and not optim_info.step_requires_closure:
            for p, q in zip(model.parameters(), twin._params, strict=True):
                q.data.copy_(p.data)
                p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            optimizer.step(loss=1.0)
            twin.step(loss=1.0)
            self.assertEqual(numbers(model), [q.detach() for q in twin._params], rtol=0, atol=0)

    @optims(DB)
    def test_profiler_names_the_step(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """``Optimizer.step#NAME.step`` and ``Optimizer.zero_grad#NAME.zero_grad``, after a copy too."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        name = type(optimizer).__name__
        for o in (optimizer, copy.deepcopy((model, optimizer))[1]):
            with profile(activities=[ProfilerActivity.CPU]) as record:
                o.zero_grad()
                o.step(lambda: None)  # without gradients: a step that is recorded, and no other work
            events = {event.key for event in record.key_averages()}
            self.assertIn(f"Optimizer.step#{name}.step", events)
            self.assertIn(f"Optimizer.zero_grad#{name}.zero_grad", events)


instantiate_device_type_tests(TestOptimInterface, globals(), only_for=("cpu", "cuda"))
