"""Public conformance check: does an optimizer keep the laws of this package, and those of ``torch.optim``?

Run it over a composition or a preset of your own; it raises :class:`AssertionError` with the law that is broken. The
tests of this package run it over every registered preset.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.second_order import SecondOrder

Factory = Callable[..., SecondOrder]
"""``factory(model, **options)``, with at least the options ``lr`` and ``params``, as :func:`optimizers.build` has."""


@dataclass
class Problem:
    """Three classes of points, a small network, and one optimizer on it.

    Args:
        model: the network.
        optimizer: what is checked.
        x: inputs, (samples, 4).
        y: classes.
    """

    model: nn.Module
    optimizer: SecondOrder
    x: Tensor
    y: Tensor

    def loss(self, batch: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(loss, outputs) of a part of the samples; a log-likelihood, so that sampled labels have one."""
        outputs = self.model(self.x[batch])
        return nn.functional.cross_entropy(outputs, self.y[batch]), outputs

    def closure(self, batch: slice = slice(None)) -> Callable[[], Tensor]:
        """What ``step`` takes."""

        def evaluate() -> Tensor:
            self.optimizer.zero_grad()
            loss, outputs = self.loss(batch)
            self.optimizer.backward(loss, outputs)
            return loss

        return evaluate

    def flat_step(self, batch: slice = slice(None)) -> None:
        """One turn of the flat loop."""
        self.optimizer.zero_grad()
        loss, outputs = self.loss(batch)
        self.optimizer.backward(loss, outputs)
        self.optimizer.step(loss=loss)

    def step(self, batch: slice = slice(None)) -> None:
        """One turn of the loop that this optimizer takes."""
        if self.optimizer.needs.trial:
            self.optimizer.step(self.closure(batch))
        else:
            self.flat_step(batch)

    def steps(self, count: int, start: int = 0) -> None:
        """Minibatch steps: half of the samples, then the other half."""
        half = len(self.x) // 2
        for t in range(start, start + count):
            self.step(slice(None, half) if t % 2 == 0 else slice(half, None))

    def theta(self) -> Tensor:
        """All parameters, flat, copied."""
        return torch.cat([p.detach().reshape(-1).clone() for p in self.model.parameters()])


def problem(factory: Factory, dtype: torch.dtype = torch.float64, **options: Any) -> Problem:
    """A fresh problem, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = (x @ torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    params = options.pop("params", None)
    if params is not None:
        options["params"] = params(model)
    optimizer = factory(model, **options)
    assert isinstance(optimizer, SecondOrder), (
        f"factory must give a SecondOrder, got {type(optimizer).__name__}"
    )
    return Problem(model, optimizer, x, y)


def check_optimizer(factory: Factory, *, steps: int = 30) -> None:
    """Check the laws that every optimizer here keeps, on a small classification problem.

    It trains. It goes on bit for bit after ``load_state_dict`` (through ``torch.save`` and ``weights_only=True``),
    ``deepcopy`` and ``pickle``. Its state holds tensors, ints and floats. A gradient that is not finite moves nothing;
    a parameter without a gradient stays; a group with ``lr=0`` stays, as does everything after a step with zero
    gradients and ``lr=0``. The learning rate may be a 0-d tensor. Both loops agree where both apply; an optimizer that
    judges a trial refuses the flat one. ``.grad``, the training mode and the global random state are left alone.

    Args:
        factory: ``factory(model, **options)``, with the options ``lr`` and ``params``.
        steps: after which the loss must have fallen, 30 by default.

    Raises:
        AssertionError: naming the law that is broken.

    >>> from optimizers import build
    >>> check_optimizer(lambda model, **options: build(model, "soaa", **options))

    Cost: about 200 steps of a network with 51 parameters.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # steps without a loss say so once
        for law in (
            trains,
            resumes_bit_exactly,
            copies_go_on_bit_exactly,
            state_is_plain,
            non_finite_gradient_moves_nothing,
            missing_gradient_moves_nothing,
            groups_have_their_own_learning_rate,
            zero_step_is_harmless,
            learning_rate_may_be_a_tensor,
            loops_agree,
            leaves_no_trace,
        ):
            if law is trains:
                trains(factory, steps)
            else:
                law(factory)


def trains(factory: Factory, steps: int = 30) -> None:
    """The loss falls, in float64 and in float32."""
    for dtype in (torch.float64, torch.float32):
        p = problem(factory, dtype)
        before = float(p.loss()[0].detach())
        for _ in range(steps):
            p.step()
        after = float(p.loss()[0].detach())
        assert after < before, (
            f"the loss must fall in {steps} steps ({dtype}): {before:.6g} became {after:.6g}"
        )


def resumes_bit_exactly(factory: Factory) -> None:
    """A fresh optimizer with a saved state goes on exactly as the one that saved it."""
    a, b = problem(factory), problem(factory)
    a.steps(3)
    file = io.BytesIO()
    torch.save({"model": a.model.state_dict(), "optimizer": a.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    b.model.load_state_dict(saved["model"])
    b.optimizer.load_state_dict(saved["optimizer"])
    a.steps(4, start=3)
    b.steps(4, start=3)
    assert torch.equal(a.theta(), b.theta()), "load_state_dict must resume bit for bit"


def copies_go_on_bit_exactly(factory: Factory) -> None:
    """A deep copy and an unpickled copy, taken together with the model, go on as the original."""
    a = problem(factory)
    a.steps(3)
    a.optimizer.zero_grad()
    pair = (a.model, a.optimizer)
    copies = {"deepcopy": copy.deepcopy(pair), "pickle": pickle.loads(pickle.dumps(pair))}
    a.steps(4, start=3)
    for name, (model, optimizer) in copies.items():
        b = Problem(model, optimizer, a.x, a.y)
        b.steps(4, start=3)
        assert torch.equal(a.theta(), b.theta()), f"{name} must go on bit for bit"


def state_is_plain(factory: Factory) -> None:
    """Dicts of tensors, ints and floats, there from the beginning; floating tensors float32 or wider."""
    p = problem(factory)
    names = {q: set(entries) for q, entries in p.optimizer.state.items()}
    p.steps(2)
    after = {q: set(entries) for q, entries in p.optimizer.state.items()}
    assert names == after, "all state must be created with the optimizer"
    for entries in p.optimizer.state.values():
        for name, value in entries.items():
            kind = type(value).__name__
            assert isinstance(value, (Tensor, int, float)), (
                f"state {name!r} must be a tensor, int or float, is {kind}"
            )
            if isinstance(value, Tensor) and value.is_floating_point():
                wide = value.dtype in (torch.float32, torch.float64)
                assert wide, f"state {name!r} must be float32 or wider, is {value.dtype}"


def non_finite_gradient_moves_nothing(factory: Factory) -> None:
    """θ and state stay, and the record counts the step."""
    for bad in (float("nan"), float("inf")):
        p = problem(factory)
        p.steps(2)
        theta, state = p.theta(), _state(p.optimizer)
        spoil = _spoiling(p, bad)
        if p.optimizer.needs.trial:
            p.optimizer.step(spoil)
        else:
            loss = spoil()
            p.optimizer.step(loss=loss)
        assert torch.equal(theta, p.theta()), f"a gradient of {bad} must not move θ"
        assert float(p.optimizer.step_info.skipped_steps) == 1.0, (
            "step_info.skipped_steps must count a skipped step"
        )
        after = _state(p.optimizer)
        for key, value in state.items():
            if key[1] != "skipped_steps":
                same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
                assert same or _both_nan(value, after[key]), (
                    f"a gradient of {bad} must not move state {key[1]!r}"
                )
        p.steps(2)
        assert bool(torch.isfinite(p.theta()).all()), "training must go on after a skipped step"


def _both_nan(a: Any, b: Any) -> bool:
    return (
        isinstance(a, Tensor)
        and a.is_floating_point()
        and bool(torch.equal(a.isnan(), b.isnan()))
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def _spoiling(p: Problem, bad: float) -> Callable[[], Tensor]:
    evaluate = p.closure()

    def spoiled() -> Tensor:
        loss = evaluate()
        first = next(p.model.parameters())
        if first.grad is not None:
            first.grad.view(-1)[0] = bad
        return loss

    return spoiled


def missing_gradient_moves_nothing(factory: Factory) -> None:
    """A parameter that got no gradient in a step stays, and the others move."""
    p = problem(factory)
    p.steps(2)
    frozen = list(p.model.parameters())[:2]
    for q in frozen:
        q.requires_grad_(False)
    before = [q.detach().clone() for q in p.model.parameters()]
    p.steps(6)
    after = list(p.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)), (
        "a parameter without a gradient must stay"
    )
    assert any(not torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True)), (
        "the other parameters must move"
    )
    for q in frozen:
        q.requires_grad_(True)
    p.steps(6)
    assert bool(torch.isfinite(p.theta()).all()), "a parameter may get gradients again"


def groups_have_their_own_learning_rate(factory: Factory) -> None:
    """A group with a learning rate of 0 stays, and the others move."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        parameters = list(model.parameters())
        return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.0}]

    p = problem(factory, params=groups)
    before = [q.detach().clone() for q in p.model.parameters()]
    p.steps(6)
    after = list(p.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True)), (
        "a group with lr=0 must stay"
    )
    assert any(not torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)), (
        "the other group must move"
    )


def zero_step_is_harmless(factory: Factory) -> None:
    """Distributed checkpoints step once with zero gradients and lr = 0 before they load a state."""
    p = problem(factory, lr=0.0)
    theta = p.theta()
    for q in p.model.parameters():
        q.grad = torch.zeros_like(q)
    if p.optimizer.needs.trial or p.optimizer.needs.graph:
        p.step()
    else:
        p.optimizer.step()
    assert torch.equal(theta, p.theta()), "a step with lr=0 must not move θ"
    for (_, name), value in _state(p.optimizer).items():
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not name.rsplit("/", 1)[-1].startswith("last_")
        ):
            assert not bool(value.isnan().any()), f"a step with lr=0 must not make state {name!r} NaN"


def learning_rate_may_be_a_tensor(factory: Factory) -> None:
    """A 0-d tensor does what the number does."""
    plain = problem(factory)
    rate = plain.optimizer.param_groups[0]["lr"]
    other = problem(factory, lr=torch.tensor(float(rate), dtype=torch.float64))
    plain.steps(4)
    other.steps(4)
    torch.testing.assert_close(
        plain.theta(),
        other.theta(),
        rtol=1e-9,
        atol=1e-9,
        msg="lr as a 0-d tensor must do what the number does",
    )


def loops_agree(factory: Factory) -> None:
    """The flat loop and the closure loop take the same step; a trial needs the closure, and the message says so."""
    flat, closed = problem(factory), problem(factory)
    if flat.optimizer.needs.trial:
        refusal = "no refusal"
        try:
            flat.flat_step()
        except RuntimeError as error:
            refusal = str(error)
        assert "closure" in refusal, (
            f"an optimizer that judges a trial must refuse a step without a closure, and name it; got {refusal}"
        )
        return
    for _ in range(4):
        flat.flat_step()
        closed.optimizer.step(closed.closure())
    assert torch.equal(flat.theta(), closed.theta()), "the flat loop and the closure loop must agree"


def leaves_no_trace(factory: Factory) -> None:
    """``.grad``, training mode, requires_grad and the global random state are as before."""
    p = problem(factory)
    p.steps(2)
    p.model.eval()
    random = torch.get_rng_state()
    evaluate = p.closure()
    gradients: list[Tensor] = []

    def recorded() -> Tensor:
        loss = evaluate()
        if not gradients:
            gradients.extend(q.grad.clone() for q in p.model.parameters() if q.grad is not None)
        return loss

    p.optimizer.step(recorded)
    assert torch.equal(random, torch.get_rng_state()), "the global random state must be left alone"
    assert not p.model.training, "the training mode must be left alone"
    assert all(q.requires_grad for q in p.model.parameters()), "requires_grad must be left alone"
    now = [q.grad for q in p.model.parameters()]
    assert all(g is not None and torch.equal(g, h) for g, h in zip(now, gradients, strict=True)), (
        ".grad must be left alone by a step"
    )


def _state(optimizer: SecondOrder) -> dict[tuple[int, str], Any]:
    """Every state entry, copied."""
    held = optimizer.state_dict()["state"]
    return {(i, name): copy.deepcopy(value) for i, entries in held.items() for name, value in entries.items()}
