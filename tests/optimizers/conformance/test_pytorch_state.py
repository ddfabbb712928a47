"""PyTorch's optimizer suite over every registered preset, its checks by name (``test/test_optim.py``): state."""
# ruff: noqa: PT009  (PyTorch's suite is built on unittest, whose comparisons know tensors)

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch.optim.optimizer import Optimizer
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerInfo, optims
from torch.testing._internal.common_utils import TestCase

from tests.optimizers.conformance.infos import DB, Affine, numbers, steps


class TestOptimState(TestCase):
    def setUp(self) -> None:
        super().setUp()
        warnings.simplefilter("ignore", UserWarning)  # steps without a loss say so once

    @optims(DB)
    def test_non_empty_state(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """State is there from the beginning, and only dicts, tensors, ints and floats."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        keys = {p: set(optimizer.state[p]) for p in model.parameters()}
        steps(model, optimizer, 2)
        self.assertEqual(keys, {p: set(optimizer.state[p]) for p in model.parameters()})
        for entries in optimizer.state.values():
            for name, value in entries.items():
                self.assertIsInstance(value, (torch.Tensor, int, float), name)

    @optims(DB)
    def test_state_dict_deterministic(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Resume is bit-exact: parameters, state, and the next steps."""
        for given in optim_info.optim_inputs_func(device=device):
            model, other = Affine(dtype, device=device), Affine(dtype, device=device)
            optimizer = optim_info.optim_cls(model, **given.kwargs)
            steps(model, optimizer, 5)
            other.load_state_dict(model.state_dict())
            saved = optimizer.state_dict()
            kept = copy.deepcopy(saved)
            resumed = optim_info.optim_cls(other, **given.kwargs)
            resumed.load_state_dict(saved)
            self.assertEqual(saved, kept)
            self.assertEqual(resumed.state_dict(), kept)
            for _ in range(5):
                steps(model, optimizer, 1)
                steps(other, resumed, 1)
                self.assertEqual(numbers(model), numbers(other), rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), resumed.state_dict(), rtol=0, atol=0)

    @optims(DB)
    def test_can_load_older_state_dict(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        """Options that a group lacks, and counters that did not exist, take their defaults."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 3)
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for name in ("maximize", "weight_decay"):
                group.pop(name, None)
        older["state"][0].pop("skipped_steps")
        optimizer.load_state_dict(older)
        self.assertEqual(optimizer.param_groups[0]["maximize"], False)
        steps(model, optimizer, 1)

    @optims(DB)
    def test_load_nontensor_step(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        model, other = Affine(dtype, device=device), Affine(dtype, device=device)
        optimizer, resumed = optim_info.optim_cls(model), optim_info.optim_cls(other)
        steps(model, optimizer, 3)
        other.load_state_dict(model.state_dict())
        saved = copy.deepcopy(optimizer.state_dict())
        for entries in saved["state"].values():
            entries["step"] = entries["step"].item()
        resumed.load_state_dict(saved)
        steps(model, optimizer, 1)
        steps(other, resumed, 1)
        self.assertEqual(numbers(model), numbers(other), rtol=0, atol=0)

    @optims(DB)
    def test_save_load_equality_with_weights_only(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        self.assertEqual(torch.load(file, weights_only=True), optimizer.state_dict())

    @optims([i for i in DB if i.supports_param_groups])
    def test_can_load_from_to_named_state_dict(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        for from_named in (True, False):
            for to_named in (True, False):
                model = Affine(dtype, device=device)

                def made(named: bool, model: Affine = model) -> Any:
                    params = model.named_parameters() if named else model.parameters()
                    return optim_info.optim_cls.of_params(list(params))

                source, target = made(from_named), made(to_named)
                steps(model, source, 2)
                target.load_state_dict(source.state_dict())
                names = [n for n, _ in model.named_parameters()] if from_named or to_named else None
                self.assertEqual(target.param_groups[0].get("param_names"), names)
                steps(model, target, 1)

    @optims(DB)
    def test_deepcopy_copies_all_public_attrs(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo
    ) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 2)
        public = {k for k in optimizer.__dict__ if not k.startswith("_")}
        twin_model, twin = copy.deepcopy((model, optimizer))
        self.assertEqual(public, {k for k in twin.__dict__ if not k.startswith("_")})
        steps(model, optimizer, 2)
        steps(twin_model, twin, 2)
        self.assertEqual(numbers(model), numbers(twin_model), rtol=0, atol=0)

    @optims(DB)
    def test_pickle(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 2)
        twin_model, twin = pickle.loads(pickle.dumps((model, optimizer)))
        steps(model, optimizer, 2)
        steps(twin_model, twin, 2)
        self.assertEqual(numbers(model), numbers(twin_model), rtol=0, atol=0)

    @optims(DB)
    def test_state_dict_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Pre and post hooks of state_dict and load_state_dict; a pre hook may replace what is loaded."""
        model = Affine(dtype, device=device)
        optimizer = optim_info.optim_cls(model)
        steps(model, optimizer, 2)
        called: list[Any] = []

        def replace(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            new = copy.deepcopy(state_dict)
            new["param_groups"][0]["lr"] = 0.125
            return new

        optimizer.register_state_dict_pre_hook(lambda o: called.append("save pre"))
        optimizer.register_state_dict_post_hook(lambda o, d: called.append("save post"))
        optimizer.register_load_state_dict_pre_hook(replace)
        optimizer.register_load_state_dict_post_hook(
            lambda o: called.append(("load post", float(o.state[model.linear.weight]["step"])))
        )
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        self.assertEqual(called, ["save pre", "save post", ("load post", 2.0)])
        self.assertEqual(optimizer.param_groups[0]["lr"], 0.125)
        self.assertNotEqual(saved["param_groups"][0]["lr"], 0.125)


instantiate_device_type_tests(TestOptimState, globals(), only_for=("cpu", "cuda"))
