"""How far to believe a curvature model: regions, subproblem solvers, and policies for radius and damping."""

from trust_region.fixed_radius import FixedRadius
from trust_region.protocols import (
    Policy,
    Proposal,
    RadiusPolicy,
    Region,
    Solution,
    StepContext,
    Subproblem,
    Verdict,
)
from trust_region.rms_box import RmsBox
from trust_region.soaa_radius import SOAARadius
from trust_region.trust_region import TrustRegion
from trust_region.unbounded import Shape, Unbounded

__all__ = [
    "FixedRadius",
    "Policy",
    "Proposal",
    "RadiusPolicy",
    "Region",
    "RmsBox",
    "SOAARadius",
    "Shape",
    "Solution",
    "StepContext",
    "Subproblem",
    "TrustRegion",
    "Unbounded",
    "Verdict",
]
