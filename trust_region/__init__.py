"""How far to believe a curvature model: regions, subproblem solvers, and policies for radius and damping."""

from trust_region.box import Box
from trust_region.fixed_radius import FixedRadius
from trust_region.l2_ball import L2Ball
from trust_region.levenberg_marquardt import LevenbergMarquardt
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
from trust_region.ratio_radius import RatioRadius
from trust_region.rms_box import RmsBox
from trust_region.soaa_radius import SOAARadius
from trust_region.steihaug_cg import SteihaugCG
from trust_region.trust_region import TrustRegion
from trust_region.unbounded import Shape, Unbounded

__all__ = [
    "Box",
    "FixedRadius",
    "L2Ball",
    "LevenbergMarquardt",
    "Policy",
    "Proposal",
    "RadiusPolicy",
    "RatioRadius",
    "Region",
    "RmsBox",
    "SOAARadius",
    "Shape",
    "Solution",
    "SteihaugCG",
    "StepContext",
    "Subproblem",
    "TrustRegion",
    "Unbounded",
    "Verdict",
]
