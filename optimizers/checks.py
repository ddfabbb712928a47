"""What a parameter group may hold, and what a step must be given: refused early, with the remedy in the message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature.protocols import CurvatureEstimator, Needs
from trust_region import TrustRegion


def check_group(group: Mapping[str, Any], needs: Needs) -> None:
    """Refuse a parameter group that cannot be optimised, argument by argument."""
    check_learning_rate(group["lr"])
    momentum, weight_decay = number(group, "momentum"), number(group, "weight_decay")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize must be a bool, got {group['maximize']!r}")
    check_direction(group, needs)
    check_flags(group)
    for p in group["params"]:
        if p.is_complex():
            raise ValueError("complex parameters are not supported; view them as real (torch.view_as_real)")
        if not p.is_floating_point():
            raise ValueError(
                f"parameters must be floating point, got {p.dtype}: pass only those that require grad"
            )


def check_direction(group: Mapping[str, Any], needs: Needs) -> None:
    """Refuse ``maximize`` where losses or their graphs are looked at too: the gradient alone would change its sign."""
    if group["maximize"] and (needs.graph or needs.trial or Needs.LOSS in needs):
        raise ValueError(
            "maximize=True works with curvature and policies that need only gradients; negate the loss in place of it"
        )


OPTIONS = (
    "weight_decay",
    "maximize",
    "compile",
    "process_group",
    "state_dtype",
    "rounding_seed",
    "beside_outputs",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
"""Options of :class:`optimizers.SecondOrder` that every preset passes on to it."""

#: Flags of ``torch.optim`` that scripts and groups carry over: the value that asks for another way than the step's own,
#: and why it is refused. The other bool, and ``None``, ask for what happens anyway.
FLAGS: dict[str, tuple[bool, str]] = {
    "foreach": (
        False,
        "the step works on lists of tensors, with the numbers of one at a time; leave the flag out",
    ),
    "fused": (
        True,
        "compile=True takes the step of SOAA, Adam, AdamW, Sophia and AdaHessian in fused kernels; leave the flag out",
    ),
    "capturable": (
        True,
        "a CUDA graph records the step of all groups; use capturable=True for the whole optimizer",
    ),
    "differentiable": (
        True,
        "the step runs under torch.no_grad; use torch.func.functional_call for an update that is differentiated",
    ),
}


def check_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags of ``torch.optim`` that ask for another way than the step's own, with what to do in their place."""
    for flag, (refused, remedy) in FLAGS.items():
        value = flags.get(flag)
        if value is None or value is (not refused):
            continue
        if value is not refused:
            raise ValueError(f"{flag} must be a bool or None, got {value!r}")
        raise ValueError(f"{flag}={value} is not supported: {remedy}")


def check_learning_rate(lr: Any) -> None:
    """A number or a 1-element tensor, >= 0."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ValueError(f"lr must be a number or a 1-element tensor, got {lr!r}")
    if not float(lr) >= 0.0:
        raise ValueError(f"lr must be >= 0, got {lr}")


def number(group: Mapping[str, Any], name: str) -> float:
    """A group's entry that must be a number."""
    value = group[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_pair(curvature: CurvatureEstimator, trust_region: TrustRegion) -> None:
    """Refuse a curvature that may be indefinite beside a trust region that cannot take one.

    An estimator that says nothing (``semidefinite`` is ``None`` or absent) passes: the first step finds out.
    """
    if getattr(curvature, "semidefinite", None) is not False:
        return
    why = trust_region.definite_only
    if why is not None:
        raise ValueError(
            f"{type(curvature).__name__} may be indefinite, and {why}: use a positive semi-definite curvature "
            "(Gauss-Newton, Fisher, KFAC), a region that takes any (Box, or L2Ball with SteihaugCG), or convex=True "
            "where the loss is known to be convex"
        )


def signal_names(needs: Needs) -> str:
    """The names of flags, for messages."""
    names = {
        Needs.HVP: "Hessian-vector products",
        Needs.GGN: "Gauss-Newton products",
        Needs.PER_SAMPLE_GRAD: "per-sample gradients",
        Needs.LAYER_IO: "layer inputs and output gradients",
        Needs.SAMPLED_LABELS: "gradients of sampled labels",
    }
    return " and ".join(text for flag, text in names.items() if flag in needs)


def check_unmoved(params: Sequence[Tensor], built_for: Sequence[tuple[torch.dtype, torch.device]]) -> None:
    """Refuse parameters whose dtype or device changed since the state was made for them."""
    for i, (p, (dtype, device)) in enumerate(zip(params, built_for, strict=True)):
        if p.dtype != dtype or p.device != device:
            raise RuntimeError(
                f"parameter {i} is {p.dtype} on {p.device}, but the optimizer's state was made for {dtype} on "
                f"{device}: move the model first, then build the optimizer (and load its state_dict)"
            )
