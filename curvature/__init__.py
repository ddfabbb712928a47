"""What the loss surface looks like: curvature estimators, and the operators that they give."""

from curvature.conjugate_gradient import ConjugateGradientResult, Outcome, conjugate_gradient
from curvature.empirical_fisher import EmpiricalFisherDiagonal
from curvature.estimate import estimate
from curvature.hutchinson import HutchinsonDiagonal
from curvature.identity import Identity
from curvature.krylov_solve import ConvergenceError
from curvature.kronecker import KFAC
from curvature.loss_graph import LossGraph
from curvature.matrix_free import GaussNewton, Hessian, MatrixFreeOperator
from curvature.operators import DiagonalOperator, IdentityOperator, Operator
from curvature.problem import Problem
from curvature.protocols import (
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

__all__ = [
    "TRANSIENT",
    "ConjugateGradientResult",
    "ConvergenceError",
    "CurvatureEstimator",
    "CurvatureOperator",
    "DiagonalOperator",
    "EmpiricalFisherDiagonal",
    "Estimator",
    "GaussNewton",
    "Hessian",
    "HutchinsonDiagonal",
    "Identity",
    "IdentityOperator",
    "KFAC",
    "LossGraph",
    "MatrixFreeOperator",
    "Needs",
    "Observation",
    "Operator",
    "Outcome",
    "Problem",
    "Registry",
    "SingularCurvatureError",
    "State",
    "Statistics",
    "UnknownNameError",
    "conjugate_gradient",
    "estimate",
    "estimators",
]
