"""Trust regions by name: complete ones, ready to be composed with any curvature that they can take."""

from __future__ import annotations

from collections.abc import Callable

from curvature.registry import Registry
from trust_region.fixed_radius import FixedRadius
from trust_region.trust_region import TrustRegion
from trust_region.unbounded import Unbounded

trust_regions: Registry[Callable[..., TrustRegion]] = Registry("trust region", "soaa.trust_region")
"""Factories of :class:`TrustRegion` by name; their keyword arguments are the options of ``optimizers.build``."""


def unbounded(damping: float = 0.0) -> TrustRegion:
    """No region and a fixed damping: the damped Newton step."""
    return TrustRegion(region=Unbounded(), radius=FixedRadius(damping=damping))


trust_regions.add("unbounded", unbounded)
