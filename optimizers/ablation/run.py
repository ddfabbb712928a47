"""One run: the one training loop that every optimizer goes through."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.ablation import adapter, cost, environment, workload
from optimizers.ablation.cell import Cell
from optimizers.ablation.config import RunConfig
from optimizers.ablation.errors import AblationError
from optimizers.ablation.schedule import factor
from optimizers.ablation.workload import Data, Split, TensorData, Workload

TRACED = ("ratio", "radius", "damping", "fisher_active_fraction", "accepted", "step_norm")
TRACE_POINTS = 200
Progress = Callable[[int], None]


def check(config: RunConfig) -> None:
    """Raise AblationError where a run could not start: names, options, values, data, device.

    Args:
        config: the run; its model and optimizer are built once and thrown away.
    """
    problem = workload.get(config.workload)
    with _blamed(config.cell):
        adapter.check_names(config.cell)
    problem.prepare()
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise AblationError(
            f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    with torch.random.fork_rng(devices=[]), _blamed(config.cell):
        adapter.build(config.cell, problem.model(), config.learning_rate, config.steps)


@contextlib.contextmanager
def _blamed(cell: Cell) -> Iterator[None]:
    """Say where in a file a cell stands that cannot be built."""
    try:
        yield
    except AblationError as error:
        if not cell.source:
            raise
        raise AblationError(f"{cell.source}: {error}") from error


def sets_its_own_step(config: RunConfig) -> bool:
    """Return whether the optimizer of a run judges trials, and so needs no learning rate."""
    with torch.random.fork_rng(devices=[]):
        model = workload.get(config.workload).model()
        return adapter.judges_trials(adapter.build(config.cell, model, config.learning_rate, config.steps))


def train(
    config: RunConfig, progress: Progress = lambda step: None, factors: list[float] | None = None
) -> dict[str, Any]:
    """Train once and return the record of it.

    Bit for bit the same numbers for the same configuration on one CPU; the caller's random state, thread
    count and determinism settings are put back.

    Args:
        config: what to run.
        progress: called with the number of steps done, now and then.
        factors: one factor a step on the learning rate, where `config.replay` names another run's radius.

    Returns:
        JSON values: configuration, environment, status, result, curve, trace.
    """
    with isolated(config):
        training = segments(config, progress, factors)
        while True:
            try:
                next(training)
            except StopIteration as end:
                record: dict[str, Any] = end.value
                return record


def segments(
    config: RunConfig, progress: Progress, factors: list[float] | None
) -> Generator[None, None, dict[str, Any]]:
    """Train as `train` does, stopping after every evaluation; the generator's value is the record."""
    started = time.time()
    record: dict[str, Any] = {
        "key": config.key,
        "config": config.as_dict(),
        "environment": environment.describe(),
        "started": started,
    }
    try:
        if config.replay and not factors:
            raise RuntimeError(f"the run {config.replay} records no radius that could be replayed")
        # the same for every seed, so that it is counted once
        counted = dataclasses.replace(config, seed=0, replay="", evaluations=1)
        spent = step_cost(counted) if config.read_test else None
        run = _Run(config, progress, factors)
        yield from run.train()
        record |= run.result()
        record["result"]["gradients_per_step"] = spent and spent.of(config.steps) / config.steps
        if spent:
            record["curve"]["gradients"] = [spent.of(step) for step in record["curve"]["step"]]
    except (AblationError, KeyboardInterrupt):
        raise
    except Exception as error:  # one method's failure must not end the others' runs
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "result": {}}
        record |= {"curve": {}, "trace": {}}
    record["elapsed_seconds"] = time.time() - started
    return record


@functools.lru_cache(maxsize=256)
def step_cost(config: RunConfig) -> cost.StepCost:
    """Return what the steps cost in gradients of the same batch, counted until they cost the same over and over.

    Args:
        config: the run; it is begun once more for this, and no clock is read.

    Returns:
        Operations over those of a gradient: of the steps 1 to 20 (or as many as there are) on average, since the very
        first may set things up; where the optimizer begins with steps of another cost, of each of these, and of the
        20 after them on average.
    """
    run = _Run(config, lambda step: None, None)
    opening = min(adapter.opening(run.optimizer), config.steps)
    first = opening or min(1, config.steps - 1)
    last = min(config.steps, first + cost.STEPS)
    batches = run.data.batches(config.batch_size, run.generator)
    gradient = 0.0
    each: list[float] = []
    run.model.train()
    for step in range(last):
        inputs, target = (tensor.to(run.device) for tensor in next(batches))
        run.set_rate(step)
        gradient = gradient or run.gradient_flops(inputs, target)
        with cost.FlopCounter() as counter:
            run.step(run.model, run.problem.loss, inputs, target)
        each.append(counter.total / gradient)
    later = each[first:]
    return cost.StepCost(tuple(each[:opening]), sum(later) / len(later) if later else 0.0)


@contextlib.contextmanager
def isolated(config: RunConfig) -> Iterator[None]:
    """Set threads and determinism for a run, and put the caller's settings and random state back."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    on_cpu = torch.device(config.device).type == "cpu"
    devices = [torch.device(config.device)] if torch.device(config.device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(config.threads)
            torch.use_deterministic_algorithms(True, warn_only=not on_cpu)
            # no kernel here reads uninitialised memory, and filling it would be timed
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass
class _Curve:
    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_metric: list[float] = field(default_factory=list)


class _Run:
    def __init__(self, config: RunConfig, progress: Progress, factors: list[float] | None) -> None:
        self.config, self.progress, self.factors = config, progress, factors
        self.problem: Workload = workload.get(config.workload)
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.data: Data = self.problem.data()
        if isinstance(self.data, TensorData):
            self.data = self.data.to(self.device, self.dtype)
        torch.manual_seed(config.seed)
        self.model: nn.Module = self.problem.model().to(self.device, self.dtype)
        self.optimizer = adapter.build(config.cell, self.model, config.learning_rate, config.steps)
        self.step = adapter.step_function(self.optimizer)
        self.scheduled = not adapter.judges_trials(self.optimizer)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        # again, so that what building an optimizer drew does not shift what training draws
        torch.manual_seed(config.seed + 1)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.curve = _Curve()
        self.trace: dict[str, list[Tensor]] = {}
        self.batch_losses: list[Tensor] = []
        self.seconds = 0.0
        # of this process, all threads: what other work on the machine, and a pause, leave alone
        self.cpu_seconds = 0.0
        self.segments: list[float] = []  # seconds a step, between evaluations
        self.cpu_segments: list[float] = []
        self.steps_done = 0

    def train(self) -> Generator[None, None, None]:
        config = self.config
        stops = [round(config.steps * i / config.evaluations) for i in range(config.evaluations + 1)]
        every = max(1, config.steps // TRACE_POINTS)
        batches = self.data.batches(config.batch_size, self.generator)
        self._evaluate()
        for first, last in itertools.pairwise(stops):
            self.model.train()
            self._synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            for step in range(first, last):
                inputs, target = next(batches)
                self.set_rate(step)
                loss = self.step(
                    self.model, self.problem.loss, inputs.to(self.device), target.to(self.device)
                )
                self.batch_losses.append(loss)
                self._record(step, every)
            self._synchronize()
            elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
            self.seconds += elapsed
            self.cpu_seconds += cpu_elapsed
            self.segments.append(elapsed / (last - first))
            self.cpu_segments.append(cpu_elapsed / (last - first))
            self.steps_done = last
            self._evaluate()
            self.progress(last)
            yield
            if not math.isfinite(self.curve.train_loss[-1]):
                return

    def gradient_flops(self, inputs: Tensor, target: Tensor) -> float:
        """Return the operations of one gradient, and leave buffers and random state as they are."""
        kept = [buffer.clone() for buffer in self.model.buffers()]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            counted = cost.gradient_flops(self.model, self.problem.loss, inputs, target)
        for buffer, before in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(before)
        return counted

    def set_rate(self, step: int) -> None:
        """Set the learning rate of a step."""
        config = self.config
        scale = factor(config.schedule, step, config.steps, config.warmup) if self.scheduled else 1.0
        if self.factors is not None:
            scale *= self.factors[min(step, len(self.factors) - 1)]  # what is replayed may have ended early
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                rate.fill_(base * scale)
            else:
                group["lr"] = base * scale

    def _record(self, step: int, every: int) -> None:
        info = getattr(self.optimizer, "step_info", None)
        if info is None:
            return
        for name in TRACED:
            # every radius, so that it can be replayed; the rest now and then, so that nothing is slowed
            value = getattr(info, name, None) if step % every == 0 or name == "radius" else None
            if isinstance(value, Tensor):
                self.trace.setdefault(name, []).append(value.detach().clone())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _evaluate(self) -> None:
        limit = self.config.evaluation_samples or self.problem.evaluation_samples
        train_loss, _ = self._measure("train", limit)
        validation_loss, validation_metric = self._measure("validation", limit)
        self.curve.step.append(self.steps_done)
        self.curve.seconds.append(self.seconds)
        self.curve.cpu_seconds.append(self.cpu_seconds)
        self.curve.train_loss.append(train_loss)
        self.curve.validation_loss.append(validation_loss)
        self.curve.validation_metric.append(validation_metric)

    @torch.no_grad()
    def _measure(self, split: Split, limit: int | None) -> tuple[float, float]:
        self.model.eval()
        loss, metric, count = 0.0, 0.0, 0
        for inputs, target in self.data.evaluation(split, limit):
            target = target.to(self.device)
            outputs = self.model(inputs.to(self.device))
            loss += float(self.problem.loss(outputs, target)) * len(inputs)
            metric += float(self.problem.metric(outputs, target)) * len(inputs)
            count += len(inputs)
        return loss / count, metric / count

    def result(self) -> dict[str, Any]:
        curve = self.curve
        losses = torch.stack(self.batch_losses).double().cpu()
        diverged = not math.isfinite(curve.train_loss[-1]) or curve.train_loss[-1] > curve.train_loss[0]
        validation_loss, validation_metric = self._measure("validation", self.config.evaluation_samples)
        result: dict[str, Any] = {
            "diverged": diverged,
            "steps": self.steps_done,
            "train_loss": curve.train_loss[-1],
            "validation_loss": validation_loss,
            "validation_metric": validation_metric,
            "seconds": self.seconds,
            "seconds_per_step": sorted(self.segments)[len(self.segments) // 2],
            "cpu_seconds": self.cpu_seconds,
            "cpu_seconds_per_step": sorted(self.cpu_segments)[len(self.cpu_segments) // 2],
            "state_bytes": state_bytes(self.optimizer),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "learning_rate": self.base_rates[0],
            "judges_trials": not self.scheduled,
        }
        if self.config.read_test:
            result["test_loss"], result["test_metric"] = self._measure("test", self.config.evaluation_samples)
        every = max(1, len(losses) // TRACE_POINTS)
        trace = {name: [float(value) for value in values] for name, values in self.trace.items()}
        trace["batch_loss"] = losses[::every].tolist()
        return {
            "status": "done",
            "result": result,
            "curve": vars(curve),
            "trace": trace,
            "trace_every": every,
        }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of every tensor in an optimizer's state."""
    seen: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Tensor):
            seen[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(dict(optimizer.state))
    return sum(seen.values())
