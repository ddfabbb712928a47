"""Building an optimizer from names: a preset, or one curvature and one trust region."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from curvature.registry import estimators, nearest
from optimizers.checks import OPTIONS, check_pair
from optimizers.registry import optimizers
from optimizers.second_order import SecondOrder
from trust_region.registry import trust_regions


def build(
    model: nn.Module,
    optimizer: str | None = None,
    *,
    curvature: str | None = None,
    trust_region: str | None = None,
    curvature_options: Mapping[str, Any] | None = None,
    trust_region_options: Mapping[str, Any] | None = None,
    params: Any = None,
    convex: bool = False,
    **options: Any,
) -> SecondOrder:
    """An optimizer from names: ``build(model, "soaa", lr=1e-3)`` or ``build(model, curvature=…, trust_region=…)``.

    Args:
        model: whose parameters that require grad are optimised; curvature that looks into layers is given it.
        optimizer: a preset's name; see :func:`available`. Without any name it is ``"soaa"``.
        curvature: an estimator's name, in place of a preset.
        trust_region: a trust region's name; ``"unbounded"`` if left out beside ``curvature``.
        curvature_options: options for the estimator alone, where a name would be ambiguous.
        trust_region_options: options for the trust region alone.
        params: parameters or groups to optimise in place of the model's.
        convex: whether the loss is known to be convex, so that its Hessian goes where an indefinite one cannot.
        **options: of the preset; or of :class:`SecondOrder`, the estimator and the trust region, told apart by name.

    Raises:
        UnknownNameError: for a name that no entry has, with the nearest ones.
        TypeError: for an option that no part takes, that two parts take, or that a part needs and was not given.
        ValueError: for curvature that may be indefinite beside a trust region that cannot take it.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> type(build(model, "soaa", lr=0.01)).__name__
    'SOAA'
    >>> build(model, curvature="hutchinson-diagonal", trust_region="rms-box", lr=0.01, interval=5).curvature.interval
    5
    >>> build(model, "saoa")
    Traceback (most recent call last):
    curvature.registry.UnknownNameError: unknown optimizer 'saoa': did you mean 'soaa'? ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be the torch.nn.Module itself, not its parameters; got {type(model).__name__}"
        )
    composed = curvature is not None or trust_region is not None
    if composed and optimizer is not None:
        raise TypeError("give either optimizer=, or curvature= and trust_region=, not both")
    chosen = [p for p in model.parameters() if p.requires_grad] if params is None else params
    if not composed:
        preset = optimizers["soaa" if optimizer is None else optimizer]
        for extra, name in (
            (curvature_options, "curvature_options"),
            (trust_region_options, "trust_region_options"),
        ):
            if extra:
                raise TypeError(
                    f"{name} goes with curvature= and trust_region=; a preset takes its options directly"
                )
        check_options(options, {f"optimizer {optimizer!r}": parameters_of(preset)})
        if takes_model(preset):
            return preset(model, **options) if params is None else preset(model, params=chosen, **options)
        return preset(chosen, **options)
    estimator = estimators["identity" if curvature is None else curvature]
    region = trust_regions["unbounded" if trust_region is None else trust_region]
    parts: dict[str, list[str]] = {
        "SecondOrder": ["lr", "momentum", *OPTIONS],
        f"curvature {curvature!r}": parameters_of(estimator),
        f"trust region {trust_region!r}": parameters_of(region),
    }
    given = check_options(options, parts)
    own, for_curvature, for_region = (dict(given[part]) for part in parts)
    for_curvature.update(curvature_options or {})
    for_region.update(trust_region_options or {})
    if takes_model(estimator):
        for_curvature.setdefault("model", model)
    check_required(estimator, f"curvature {curvature!r}", for_curvature)
    check_required(region, f"trust region {trust_region!r}", for_region)
    what, where = estimator(**for_curvature), region(**for_region)
    if not convex:
        check_pair(what, where)
    return SecondOrder(chosen, curvature=what, trust_region=where, **own)


def parameters_of(factory: Callable[..., Any]) -> list[str]:
    """The names of the options that a factory takes."""
    names = []
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "params":
            names.append(name)
        elif (
            parameter.kind is parameter.VAR_KEYWORD
            and isinstance(factory, type)
            and issubclass(factory, SecondOrder)
        ):
            names += OPTIONS
    return names


def check_required(factory: Callable[..., Any], part: str, given: Mapping[str, Any]) -> None:
    """Name the options without which a part cannot be made."""
    missing = [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in given
    ]
    if missing:
        raise TypeError(
            f"{part} needs {' and '.join(f'{name}=' for name in missing)}: build(model, …, {missing[0]}=…)"
        )


def takes_model(factory: Callable[..., Any]) -> bool:
    """Whether a factory is to be given the model."""
    return "model" in inspect.signature(factory).parameters


def check_options(options: Mapping[str, Any], parts: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Route every option to the one part that takes it."""
    routed: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in options.items():
        takers = [part for part, names in parts.items() if name in names]
        if not takers:
            valid = sorted({n for names in parts.values() for n in names if n != "model"})
            raise TypeError(f"no part takes an option {name!r}: {nearest(name, valid)}")
        if len(takers) > 1:
            raise TypeError(
                f"option {name!r} is taken by {' and by '.join(takers)}: "
                "give it in curvature_options= or trust_region_options="
            )
        routed[takers[0]][name] = value
    return routed
