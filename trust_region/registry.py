"""Trust regions by name: complete ones, ready to be composed with any curvature that they can take.

Every entry is a factory; its keyword arguments are the options of ``optimizers.build``. Options that an entry does not
name go to its radius policy (``initial_radius=``, ``eta=``, …).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from curvature.registry import Registry
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
from trust_region.protocols import Subproblem
from trust_region.ratio_radius import RatioRadius
from trust_region.relative_ball import RelativeBall
from trust_region.rms_box import RmsBox
from trust_region.soaa_radius import SOAARadius
from trust_region.spectral_ball import SpectralBall
from trust_region.steihaug_cg import SteihaugCG
from trust_region.tadam_radius import TadamRadius
from trust_region.trust_region import TrustRegion
from trust_region.unbounded import Unbounded

trust_regions: Registry[Callable[..., TrustRegion]] = Registry("trust region", "soaa.trust_region")
"""Factories of :class:`TrustRegion` by name; their keyword arguments are the options of ``optimizers.build``."""


def unbounded(damping: float = 0.0) -> TrustRegion:
    """No region and a fixed damping: the damped Newton step."""
    return TrustRegion(region=Unbounded(), radius=FixedRadius(damping=damping))


def box(radius: float = 1.0, damping: float = 0.0) -> TrustRegion:
    """Steps clipped element by element to a fixed radius (Sophia's clipping)."""
    return TrustRegion(region=Box(), radius=FixedRadius(radius, damping))


def rms_box(radius: float = 1.0, damping: float = 0.0, **region: Any) -> TrustRegion:
    """The box of Adam and SOAA with a fixed radius; further options are :class:`RmsBox`'s."""
    return TrustRegion(region=RmsBox(**region), radius=FixedRadius(radius, damping))


def l2_ball(
    radius: float = 1.0, damping: float = 0.0, scope: Literal["global", "tensor"] = "global"
) -> TrustRegion:
    """A Euclidean ball of fixed radius."""
    return TrustRegion(region=L2Ball(scope), radius=FixedRadius(radius, damping))


def kl_ball(radius: float = 0.01, damping: float = 1e-3) -> TrustRegion:
    """pᵀBp <= Δ, fixed."""
    return TrustRegion(region=KLBall(), radius=FixedRadius(radius, damping))


def kl_clip(radius: float = 1e-3, damping: float = 1e-3) -> TrustRegion:
    """(ηp)ᵀB(ηp) <= κ, fixed: the step after the learning rate, as K-FAC optimizers clip it."""
    return TrustRegion(region=KLBall(includes_lr=True), radius=FixedRadius(radius, damping))


def spectral_ball(radius: float = 1.0, damping: float = 0.0, **region: Any) -> TrustRegion:
    """A spectral-norm ball of fixed radius for every matrix; further options are :class:`SpectralBall`'s."""
    return TrustRegion(region=SpectralBall(**region), radius=FixedRadius(radius, damping))


def relative_ball(radius: float = 1.0, damping: float = 0.0, **region: Any) -> TrustRegion:
    """A ball of fixed radius relative to every layer's norm; further options are :class:`RelativeBall`'s."""
    return TrustRegion(region=RelativeBall(**region), radius=FixedRadius(radius, damping))


def soaa(
    total_steps: int | None = None,
    gamma: float = 0.1,
    beta: float = 0.9,
    eps: float = 1e-8,
    scope: Literal["global", "tensor"] = "global",
    prediction: Literal["paper", "model"] = "paper",
    damping: float = 0.0,
    interior: bool = True,
) -> TrustRegion:
    """SOAA's box and its clipped ratio; without `interior` every step goes to the box's edge, as Adam's."""
    return TrustRegion(
        region=RmsBox(eps=eps, scope=scope, interior=interior),
        radius=SOAARadius(total_steps, gamma, beta, eps, scope, prediction),
        damping=damping,
    )


def tadam(
    total_steps: int | None = None,
    gamma: float = 0.25,
    beta: float = 0.9,
    eps: float = 1e-8,
    damping: float = 0.0,
) -> TrustRegion:
    """Tadam's box and its ratio in three levels."""
    return TrustRegion(
        region=RmsBox(eps=eps, rank_one_scale=False),
        radius=TadamRadius(total_steps, gamma, beta, eps),
        damping=damping,
    )


def ratio(max_iterations: int | None = None, tolerance: float | None = None, **policy: Any) -> TrustRegion:
    """Classical trust-region Newton: a Euclidean ball, Steihaug-CG, the ratio's radius."""
    return TrustRegion(L2Ball(), SteihaugCG(max_iterations, tolerance), RatioRadius(**policy))


def ratio_box(damping: float = 0.0, **policy: Any) -> TrustRegion:
    """A box whose radius follows the ratio."""
    return TrustRegion(region=Box(), radius=RatioRadius(**policy), damping=damping)


def ratio_kl_ball(damping: float = 0.0, **policy: Any) -> TrustRegion:
    """A KL ellipsoid whose radius follows the ratio."""
    return TrustRegion(region=KLBall(), radius=RatioRadius(**policy), damping=damping)


def dogleg(damping: float = 0.0, **policy: Any) -> TrustRegion:
    """Powell's dogleg with the ratio's radius, for positive definite curvature."""
    return _classical(Dogleg(), policy, damping)


def cauchy(**policy: Any) -> TrustRegion:
    """The Cauchy point with the ratio's radius."""
    return _classical(CauchyPoint(), policy)


def exact(max_size: int = 2000, **policy: Any) -> TrustRegion:
    """The exact step with the ratio's radius, for small problems."""
    return _classical(ExactSubproblem(max_size), policy)


def krylov(max_iterations: int = 100, tolerance: float | None = None, **policy: Any) -> TrustRegion:
    """Generalised Lanczos with the ratio's radius."""
    return _classical(Krylov(max_iterations, tolerance), policy)


def _classical(subproblem: Subproblem, policy: dict[str, Any], damping: float = 0.0) -> TrustRegion:
    return TrustRegion(L2Ball(), subproblem, RatioRadius(**policy), damping)


def levenberg_marquardt(
    cg: bool = False, max_iterations: int | None = None, tolerance: float | None = None, **policy: Any
) -> TrustRegion:
    """Adaptive damping and no region; ``cg=True`` solves by conjugate gradients (Hessian-free), else by ``solve``."""
    if cg:
        return TrustRegion(L2Ball(), SteihaugCG(max_iterations, tolerance), LevenbergMarquardt(**policy))
    return TrustRegion(region=Unbounded(), radius=LevenbergMarquardt(**policy))


def cubic(max_iterations: int = 100, tolerance: float | None = None, **policy: Any) -> TrustRegion:
    """Adaptive cubic regularisation (ARC)."""
    return TrustRegion(Unbounded(), CubicModel(max_iterations, tolerance), AdaptiveCubic(**policy))


def cat(max_iterations: int = 100, tolerance: float | None = None, **policy: Any) -> TrustRegion:
    """The consistently adaptive trust region, with the Lanczos solver."""
    return TrustRegion(L2Ball(), Krylov(max_iterations, tolerance), CAT(**policy))


def backtracking(radius: float = 0.01, damping: float = 1e-3, **policy: Any) -> TrustRegion:
    """A KL ellipsoid of fixed radius, shortened after every refused trial (TRPO)."""
    return TrustRegion(region=KLBall(), radius=Backtracking(radius=radius, damping=damping, **policy))


def trpo(
    radius: float = 0.02,
    damping: float = 1e-3,
    max_iterations: int = 10,
    tolerance: float = 1e-10,
    **policy: Any,
) -> TrustRegion:
    """A KL ellipsoid reached by a few conjugate-gradient iterations, shortened after every refused trial."""
    return TrustRegion(
        KLBall(),
        KLConjugateGradient(max_iterations, tolerance),
        Backtracking(radius=radius, damping=damping, **policy),
    )


_entries: dict[str, Callable[..., TrustRegion]] = {
    "unbounded": unbounded,
    "box": box,
    "rms-box": rms_box,
    "l2-ball": l2_ball,
    "kl-ball": kl_ball,
    "kl-clip": kl_clip,
    "spectral-ball": spectral_ball,
    "relative-ball": relative_ball,
    "soaa": soaa,
    "tadam": tadam,
    "ratio": ratio,
    "ratio-box": ratio_box,
    "ratio-kl-ball": ratio_kl_ball,
    "dogleg": dogleg,
    "cauchy": cauchy,
    "exact": exact,
    "krylov": krylov,
    "levenberg-marquardt": levenberg_marquardt,
    "cubic": cubic,
    "cat": cat,
    "backtracking": backtracking,
    "trpo": trpo,
}
for _name, _factory in _entries.items():
    trust_regions.add(_name, _factory)
