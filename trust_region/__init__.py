"""How far to believe a curvature model: regions, subproblem solvers, and policies for radius and damping."""

from trust_region.adaptive_cubic import AdaptiveCubic
from trust_region.backtracking import Backtracking
from trust_region.box import Box
from trust_region.cat import CAT
from trust_region.cauchy_point import CauchyPoint
from trust_region.cubic_model import CubicModel
from trust_region.dogleg import Dogleg
from trust_region.exact import ExactSubproblem
from trust_region.fixed_radius import FixedRadius
from trust_region.kl_ball import KLBall
from trust_region.kl_conjugate_gradient import KLConjugateGradient
from trust_region.krylov import Krylov
from trust_region.l2_ball import L2Ball
from trust_region.levenberg_marquardt import LevenbergMarquardt
from trust_region.paced import Paced
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
from trust_region.recorded_radius import RecordedRadius
from trust_region.relative_ball import RelativeBall
from trust_region.rms_box import RmsBox
from trust_region.soaa_radius import SOAARadius
from trust_region.spectral_ball import SpectralBall
from trust_region.steihaug_cg import SteihaugCG
from trust_region.tadam_radius import TadamRadius
from trust_region.trust_region import TrustRegion
from trust_region.unbounded import Shape, Unbounded

__all__ = [
    "CAT",
    "AdaptiveCubic",
    "Backtracking",
    "Box",
    "CauchyPoint",
    "CubicModel",
    "Dogleg",
    "ExactSubproblem",
    "FixedRadius",
    "KLBall",
    "KLConjugateGradient",
    "Krylov",
    "L2Ball",
    "LevenbergMarquardt",
    "Paced",
    "Policy",
    "Proposal",
    "RadiusPolicy",
    "RatioRadius",
    "RecordedRadius",
    "Region",
    "RelativeBall",
    "RmsBox",
    "SOAARadius",
    "Shape",
    "Solution",
    "SpectralBall",
    "SteihaugCG",
    "StepContext",
    "Subproblem",
    "TadamRadius",
    "TrustRegion",
    "Unbounded",
    "Verdict",
]
