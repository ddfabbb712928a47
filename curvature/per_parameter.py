"""One curvature for some parameters, another for the rest, by a rule on name, module or shape.

Legend: K groups of parameters, one an estimator; B = diag(B_1, …, B_K). The state of group k holds that estimator's
entries under ``"k.name"``, with tensors without elements where a parameter belongs to another group.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from curvature.block_operator import BlockOperator
from curvature.loss_graph import LossGraph
from curvature.problem import Problem
from curvature.protocols import (
    TRANSIENT,
    CurvatureEstimator,
    CurvatureOperator,
    Estimator,
    Needs,
    Observation,
    State,
    Statistics,
)
from curvature.registry import estimators

Rule: TypeAlias = (
    "str | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, Tensor, nn.Module], bool]"
)
"""A glob pattern on the parameter's name, its module's type, or ``rule(name, parameter, module)``."""

MEMBER = "member"


@dataclass(frozen=True)
class PerParameter(Estimator):
    """A rule that mixes estimators: the first rule that fits a parameter gives its curvature.

    B is block-diagonal, one block an estimator: no curvature between their parameters is seen.

    Args:
        rules: (rule, estimator) pairs, tried in order. A rule is a glob pattern on the parameter's name
            (``"*.bias"``, ``"*"``), a module type or a tuple of types that the module holding the parameter must be
            an instance of, or a function ``rule(name, parameter, module) -> bool`` (for shapes). Pairs that name the
            same estimator object make one group, so that a layer's weight and bias can be one block. A parameter that
            several modules share is asked about under each of its names. Without rules: :class:`KFAC` for linear and
            convolutional layers, :class:`EmpiricalFisherDiagonal` for the rest.
        model: the model that names the parameters; needed in an optimizer, known to :func:`curvature.estimate`.

    Raises:
        TypeError: for rules that are no (rule, estimator) pairs, or an estimator's class in place of an estimator.
        ValueError: for a parameter that no rule fits, or that is not the model's; for a rule that is a name, without
            wildcards, of which the model has no parameter.

    >>> from curvature import HutchinsonDiagonal, Identity, estimate
    >>> model = nn.Linear(2, 1)
    >>> mixed = PerParameter([("*bias", Identity()), (lambda name, p, m: p.dim() == 2, HutchinsonDiagonal())])
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> estimate(mixed, model, nn.MSELoss(), [(x, torch.zeros(2, 1))]).diagonal()[1]
    tensor([1.])

    Cost: that of the parts, each on its own parameters; products on the graph are taken by each part for itself.
    """

    rules: Sequence[tuple[Rule, CurvatureEstimator]] = ()
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules = checked_rules(self.rules) or default_rules(self.model)
        object.__setattr__(self, "rules", rules)

    @property
    def parts(self) -> list[CurvatureEstimator]:
        """The estimators, each object once."""
        return list({id(estimator): estimator for _, estimator in self.rules}.values())

    @property
    def needs(self) -> Needs:
        """What any part needs."""
        return reduce(or_, (part.needs for part in self.parts))

    @property
    def keeps_graph(self) -> bool:  # type: ignore[override]
        """Whether a part multiplies while the step is computed."""
        return any(getattr(part, "keeps_graph", False) for part in self.parts)

    @property
    def tracks_steps(self) -> bool:  # type: ignore[override]
        """Whether a part wants steps."""
        return any(getattr(part, "tracks_steps", False) for part in self.parts)

    @property
    def evaluates_gradients(self) -> bool:  # type: ignore[override]
        """Whether a part takes finite differences in the closure."""
        return any(getattr(part, "evaluates_gradients", False) for part in self.parts)

    @property
    def semidefinite(self) -> bool | None:  # type: ignore[override]
        """Whether every part is; one of which nobody knows leaves it open."""
        promises = [getattr(part, "semidefinite", None) for part in self.parts]
        return False if False in promises else None if None in promises else True

    @property
    def symmetric_statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        """The parts', by the names that they have here."""
        parts = enumerate(self.parts)
        return tuple(f"{k}.{key}" for k, part in parts for key in getattr(part, "symmetric_statistics", ()))

    def assign(self, model: nn.Module, params: Sequence[Tensor]) -> list[int]:
        """The group of every parameter: an index into :attr:`parts`."""
        where: dict[int, list[tuple[str, nn.Module]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                where.setdefault(id(p), []).append((f"{prefix}.{name}" if prefix else name, module))
        check_names([rule for rule, _ in self.rules], [name for found in where.values() for name, _ in found])
        group = {id(part): k for k, part in enumerate(self.parts)}
        found = []
        for i, p in enumerate(params):
            if id(p) not in where:
                raise ValueError(
                    f"PerParameter(model=) must be the model of all parameters, but parameter {i} of shape "
                    f"{tuple(p.shape)} is not in it"
                )
            places = where[id(p)]
            estimator = next(
                (e for rule, e in self.rules if any(fits(rule, name, p, module) for name, module in places)),
                None,
            )
            if estimator is None:
                raise ValueError(
                    f"no rule fits parameter {places[0][0]!r}: end the rules with ('*', estimator)"
                )
            found.append(group[id(estimator)])
        return found

    def init(self, params: Sequence[Tensor]) -> State:
        """The parts' states, side by side."""
        if self.model is None:
            raise ValueError(
                "PerParameter needs the model to name the parameters: give PerParameter(rules, model=model)"
            )
        groups = self.assign(self.model, params)
        state: State = {}
        for k, part in enumerate(self.parts):
            members = [i for i, g in enumerate(groups) if g == k]
            # Who belongs to a part is read from shapes: no value on the device is waited for.
            state[f"{k}.{MEMBER}"] = [
                torch.empty(int(g == k), device=p.device) for g, p in zip(groups, params, strict=True)
            ]
            if getattr(part, "outlives_a_step", False):
                raise ValueError(
                    f'PerParameter cannot save what {type(part).__name__}(inverses="owner") keeps on its ranks between '
                    'steps: use inverses="everywhere" (or KFAC with inverse_interval=1)'
                )
            if members:
                write(state, k, members, part.init([params[i] for i in members]), len(params), params)
        return state

    def due(self, state: State) -> bool:
        """Whether a part measures."""
        return any(bool(part.needs.graph) and is_due(part, own) for _, part, _, own in self._split(state))

    def measure(self, state: State, graph: LossGraph) -> Statistics:
        """The statistics of the parts that are due, each on its own parameters."""
        statistics: Statistics = {}
        for k, part, members, own in self._split(state):
            if not part.needs.graph or not is_due(part, own):
                continue
            measured: Statistics = part.measure(own, graph.restricted(members))  # type: ignore[attr-defined]
            for key, value in measured.items():
                statistics[f"{k}.{key}"] = (
                    spread(value, members, graph.params) if isinstance(value, list) else value
                )
            write(state, k, members, own, len(graph.params), graph.params)
        return statistics

    def update(self, state: State, seen: Observation) -> None:
        """Show every part its own parameters."""
        for k, part, members, own in self._split(state):
            part.update(own, observed(seen, k, members))
            write(state, k, members, own, len(seen.gradient), seen.parameters)

    def operator(self, state: State) -> BlockOperator:
        """The parts' operators as blocks."""
        return joined([(members, part.operator(own)) for _, part, members, own in self._split(state)])

    def estimate(self, problem: Problem) -> CurvatureOperator:
        """Every part's own one-shot estimate, on its own parameters."""
        from curvature.estimate import run

        groups = self.assign(problem.model, problem.params)
        blocks = []
        for k, part in enumerate(self.parts):
            members = [i for i, g in enumerate(groups) if g == k]
            if members:
                blocks.append((members, run(part, problem.restricted([problem.params[i] for i in members]))))
        return joined(blocks)

    def _split(self, state: State) -> list[tuple[int, CurvatureEstimator, list[int], State]]:
        """(k, estimator, its parameters, its state) for every part that has a parameter."""
        split = []
        for k, part in enumerate(self.parts):
            marks = cast("list[Tensor]", state[f"{k}.{MEMBER}"])
            members = [i for i, mark in enumerate(marks) if mark.numel()]
            if members:
                split.append((k, part, members, read(state, k, members)))
        return split


def default_rules(model: nn.Module | None) -> tuple[tuple[Rule, CurvatureEstimator], ...]:
    """K-FAC for linear and convolutional layers, the empirical Fisher diagonal for the rest."""
    from curvature.empirical_fisher import EmpiricalFisherDiagonal
    from curvature.kronecker import KFAC

    if model is None:
        raise ValueError(
            "PerParameter needs rules, (rule, estimator) pairs, or a model for the default ones: got neither"
        )
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (matrices, KFAC(model)), ("*", EmpiricalFisherDiagonal())


def checked_rules(rules: Any) -> tuple[tuple[Rule, CurvatureEstimator], ...]:
    """The rules as pairs, refused where they are none."""
    pairs = []
    for i, pair in enumerate(rules):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"rules must be (rule, estimator) pairs, got {pair!r} at position {i}")
        rule, estimator = pair
        kinds = rule if isinstance(rule, tuple) else (rule,)
        if not (isinstance(rule, str) or all(isinstance(k, type) for k in kinds) or callable(rule)):
            raise TypeError(
                f"a rule must be a pattern, a module type, a tuple of types or a function, got {rule!r} at position {i}"
            )
        if isinstance(estimator, type) or not all(
            callable(getattr(estimator, name, None)) for name in ("init", "update", "operator")
        ):
            shown = f"the class {estimator.__name__}" if isinstance(estimator, type) else repr(estimator)
            raise TypeError(f"rule {rule!r} must come with an estimator, such as Identity(), got {shown}")
        pairs.append((rule, estimator))
    return tuple(pairs)


def check_names(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Refuse a rule that names one parameter, and names none: its estimator would never be asked."""
    for rule in rules:
        if isinstance(rule, str) and not any(c in rule for c in "*?[") and rule not in names:
            near = difflib.get_close_matches(rule, names, n=1, cutoff=0.0)
            raise ValueError(
                f"rule {rule!r} names no parameter of the model (the nearest is {near[0]!r}): mend it, or leave it out"
                if near
                else f"rule {rule!r} names no parameter of the model: it has none"
            )


def fits(rule: Rule, name: str, parameter: Tensor, module: nn.Module) -> bool:
    """Whether a rule speaks of this parameter."""
    if isinstance(rule, str):
        return fnmatch.fnmatchcase(name, rule)
    if isinstance(rule, (type, tuple)):
        return isinstance(module, rule)
    return bool(rule(name, parameter, module))


def is_due(part: CurvatureEstimator, own: State) -> bool:
    """Whether the part measures in the coming step."""
    due = getattr(part, "due", None)
    return True if due is None else bool(due(own))


def read(state: State, k: int, members: Sequence[int]) -> State:
    """The state of part ``k``, as it keeps it itself."""
    own: State = {}
    prefix = f"{k}."
    for key, value in state.items():
        if key.startswith(prefix) and key != prefix + MEMBER:
            own[key[len(prefix) :]] = [value[i] for i in members] if isinstance(value, list) else value
    transients = cast("dict[int, Any]", state.get(TRANSIENT, {}))
    if k in transients:
        own[TRANSIENT] = transients[k]
    return own


def write(
    state: State, k: int, members: Sequence[int], own: State, count: int, like: Sequence[Tensor]
) -> None:
    """The inverse of :func:`read`."""
    for key, value in own.items():
        if key == TRANSIENT:
            cast("dict[int, Any]", state.setdefault(TRANSIENT, {}))[k] = value
            continue
        name = f"{k}.{key}"
        if not isinstance(value, list):
            state[name] = value
            continue
        held = cast("list[Tensor] | None", state.get(name))
        if held is None:
            state[name] = spread(value, members, like)
        else:
            for i, x in zip(members, value, strict=True):
                held[i] = x


def spread(values: Sequence[Tensor], members: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """One tensor a parameter: ``values`` at ``members``, tensors without elements elsewhere."""
    full = [torch.empty(0, dtype=values[0].dtype, device=p.device) for p in like]
    for i, x in zip(members, values, strict=True):
        full[i] = x
    return full


def observed(seen: Observation, k: int, members: Sequence[int]) -> Observation:
    """What part ``k`` is shown."""
    prefix = f"{k}."
    statistics: Statistics = {}
    for key, value in seen.statistics.items():
        if key.startswith(prefix):
            statistics[key[len(prefix) :]] = [value[i] for i in members] if isinstance(value, list) else value

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in members] if values else []

    gradient_at = None
    if seen.gradient_at is not None:
        whole, params = seen.gradient_at, seen.parameters

        def gradient_at(shift: Sequence[Tensor]) -> list[Tensor]:
            full = [torch.zeros_like(p) for p in params]
            for i, x in zip(members, shift, strict=True):
                full[i] = x
            return pick(whole(full))

    return replace(
        seen,
        gradient=pick(seen.gradient),
        statistics=statistics,
        graphs=[graph.restricted(members) for graph in seen.graphs],
        parameters=pick(seen.parameters),
        step_change=None if seen.step_change is None else pick(seen.step_change),
        gradient_at=gradient_at,
    )


def joined(blocks: Sequence[tuple[Sequence[int], CurvatureOperator]]) -> BlockOperator:
    """Operators of groups as one."""
    like: dict[int, Tensor] = {}
    for members, operator in blocks:
        shaped = getattr(operator, "like", None)
        like.update(zip(members, operator.diagonal() if shaped is None else shaped, strict=True))
    return BlockOperator([like[i] for i in range(len(like))], blocks)


estimators.add("per-parameter", PerParameter)
