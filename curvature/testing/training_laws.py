"""Laws of training: what an estimator is, what its state holds, what a step does to it and to nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from curvature import vectors
from curvature.loss_graph import LossGraph
from curvature.protocols import CACHE, TRANSIENT, Needs, State
from curvature.testing.subject import Subject, close


def check_contract(subject: Subject) -> None:
    """A frozen dataclass with needs, init, update and operator."""
    estimator = subject.estimator(subject.model())
    for name in ("init", "update", "operator"):
        assert callable(getattr(estimator, name, None)), f"the estimator has no method {name!r}"
    assert isinstance(estimator.needs, Needs), f"needs must be a Needs, got {estimator.needs!r}"
    parameters = getattr(type(estimator), "__dataclass_params__", None)
    assert parameters is not None, "the estimator must be a dataclass of its hyperparameters"
    assert parameters.frozen, "the dataclass must be frozen: what an estimator learns goes into its state"


def check_statistics(subject: Subject) -> None:
    """Statistics are tensors, or one a parameter; those named symmetric are, since ranks send half of them."""
    model = subject.model()
    params = list(model.parameters())
    estimator = subject.estimator(model)
    if not (estimator.needs.graph and hasattr(estimator, "measure")):
        return
    state = estimator.init(params)  # before the forward pass, which it may observe
    loss, outputs = subject.loss(model)
    statistics = estimator.measure(state, LossGraph(loss, params, outputs))
    for key, value in statistics.items():
        assert not isinstance(value, list) or len(value) == len(params), (
            f"statistics[{key!r}] must hold {len(params)} tensors, got {len(value)}"
        )
        if key not in getattr(estimator, "symmetric_statistics", ()):
            continue
        for x in value if isinstance(value, list) else [value]:
            if x.dim() != 3:
                continue
            assert x.shape[-1] == x.shape[-2], (
                f"statistics[{key!r}] is named symmetric and has shape {tuple(x.shape)}"
            )
            close(x, x.mT, f"statistics[{key!r}] is named symmetric", x)


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
            if key in (TRANSIENT, CACHE):
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


def check_side_effects(subject: Subject) -> None:
    """No estimate or step moves .grad, parameters, requires_grad, modes or the global random state.

    An estimate moves no buffer either, and leaves no hook behind; in a step the forward pass is the caller's.
    """
    model = subject.model("counting")
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    random_state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    subject.estimate(model).to_dense()
    for name, b in model.named_buffers():
        held, value = buffers[name]
        assert b is held, f"buffer {name!r} was replaced"
        assert torch.equal(b, value), f"buffer {name!r} was changed"
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), (
        "a hook was left in the model"
    )
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
    """State survives torch.save and torch.load(weights_only=True), and the run goes on as if uninterrupted.

    What an estimator keeps beside its state (``gathered_keys``) is saved and taken as its contract says.
    """
    model = subject.model()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    for _ in range(2):
        subject.observe(estimator, state, model)
        transient = state.pop(TRANSIENT, None)
    file = io.BytesIO()
    saved = {key: value for key, value in state.items() if key != CACHE}
    divided = bool(getattr(estimator, "gathered_keys", ()))
    torch.save((saved, estimator.gather(state) if divided else {}), file)  # type: ignore[attr-defined]
    file.seek(0)
    loaded, given = torch.load(file, weights_only=True)
    if divided:
        estimator.check_gathered(loaded, given)  # type: ignore[attr-defined]
        estimator.take_gathered(loaded, given)  # type: ignore[attr-defined]
    results = []
    for held in (state, loaded):
        subject.observe(estimator, held, model)
        results.append(estimator.operator(held).to_dense())
        held.pop(TRANSIENT, None)
    del transient
    assert torch.equal(*results), "a loaded state goes on differently from the one that was saved"


#: Steps over which memory must stand still, after as many in which histories may fill.
STEPS = 25


def check_memory(subject: Subject) -> None:
    """State and living tensors stop growing: 25 steps more leave as many bytes and tensors as there were."""
    model = subject.model()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    found = []
    with no_collector():
        for _ in range(2):
            for _ in range(STEPS):
                subject.observe(estimator, state, model)
                estimator.operator(state).matvec(list(model.parameters()))
                state.pop(TRANSIENT, None)
            found.append((state_bytes(state), living_tensors()))
    (bytes_before, before), (bytes_after, after) = found
    assert bytes_after <= bytes_before, (
        f"the state grew from {bytes_before} to {bytes_after} bytes in {STEPS} steps"
    )
    assert after < before + STEPS, f"{after - before} more tensors live after {STEPS} more steps"


def check_graph(subject: Subject) -> None:
    """No graph of a loss outlives its step, even before the garbage collector runs."""
    model = subject.model()
    estimator = subject.estimator(model)
    state = estimator.init(list(model.parameters()))
    with no_collector():
        for step in range(3):
            graph = subject.observe(estimator, state, model)
            state.pop(TRANSIENT, None)
            assert graph() is None, f"the graph of step {step + 1} is still alive after it"


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Inside, only reference counts free memory: what waits for the collector would fill an accelerator."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def state_bytes(state: State) -> int:
    """Bytes of all tensors in the state."""
    tensors = [
        x for v in state.values() for x in (v if isinstance(v, list) else [v]) if isinstance(x, Tensor)
    ]
    return sum(x.numel() * x.element_size() for x in tensors)


def living_tensors() -> int:
    """Tensors that Python knows of."""
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())
