"""What the loss surface looks like: curvature estimators, and the operators that they give."""

from curvature.adahessian_diagonal import AdaHessianDiagonal
from curvature.block_operator import BlockOperator
from curvature.conjugate_gradient import ConjugateGradientResult, Outcome, conjugate_gradient
from curvature.empirical_fisher import EmpiricalFisherDiagonal
from curvature.estimate import estimate
from curvature.fisher_diagonal import FisherDiagonal
from curvature.gauss_newton_diagonal import GaussNewtonDiagonal
from curvature.gradient_variance import GradientVariance, RankOneCorrectedDiagonal
from curvature.hessian_diagonal import HessianDiagonal
from curvature.hutchinson import HutchinsonDiagonal
from curvature.identity import Identity
from curvature.kronecker import EKFAC, KFAC
from curvature.krylov_solve import ConvergenceError
from curvature.lbfgs import LBFGS
from curvature.loss_graph import LossGraph
from curvature.low_rank import LowRank
from curvature.low_rank_operator import LowRankOperator
from curvature.lsr1 import LSR1
from curvature.matrix_free import EmpiricalFisher, Fisher, GaussNewton, Hessian, MatrixFreeOperator
from curvature.operators import DiagonalOperator, IdentityOperator, Operator
from curvature.per_parameter import PerParameter
from curvature.problem import Problem
from curvature.protocols import (
    CACHE,
    TRANSIENT,
    CurvatureEstimator,
    CurvatureOperator,
    Estimator,
    Needs,
    Observation,
    SingularCurvatureError,
    State,
    Statistics,
)
from curvature.registry import Registry, UnknownNameError, estimators
from curvature.rotated_diagonal import RotatedDiagonalOperator
from curvature.scipy_export import to_scipy
from curvature.shampoo import Shampoo
from curvature.soap import SOAP
from curvature.wrapped_diagonal import FlooredDiagonal, RootDiagonal

__all__ = [
    "CACHE",
    "EKFAC",
    "KFAC",
    "LBFGS",
    "LSR1",
    "SOAP",
    "TRANSIENT",
    "AdaHessianDiagonal",
    "BlockOperator",
    "ConjugateGradientResult",
    "ConvergenceError",
    "CurvatureEstimator",
    "CurvatureOperator",
    "DiagonalOperator",
    "EmpiricalFisher",
    "EmpiricalFisherDiagonal",
    "Estimator",
    "Fisher",
    "FisherDiagonal",
    "FlooredDiagonal",
    "GaussNewton",
    "GaussNewtonDiagonal",
    "GradientVariance",
    "Hessian",
    "HessianDiagonal",
    "HutchinsonDiagonal",
    "Identity",
    "IdentityOperator",
    "LossGraph",
    "LowRank",
    "LowRankOperator",
    "MatrixFreeOperator",
    "Needs",
    "Observation",
    "Operator",
    "Outcome",
    "PerParameter",
    "Problem",
    "RankOneCorrectedDiagonal",
    "Registry",
    "RootDiagonal",
    "RotatedDiagonalOperator",
    "Shampoo",
    "SingularCurvatureError",
    "State",
    "Statistics",
    "UnknownNameError",
    "conjugate_gradient",
    "estimate",
    "estimators",
    "to_scipy",
]
