"""What the loss surface looks like: curvature estimators, and the operators that they give."""

from curvature.empirical_fisher import EmpiricalFisherDiagonal
from curvature.estimate import estimate
from curvature.hutchinson import HutchinsonDiagonal
from curvature.identity import Identity
from curvature.loss_graph import LossGraph
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
    "CurvatureEstimator",
    "CurvatureOperator",
    "DiagonalOperator",
    "EmpiricalFisherDiagonal",
    "Estimator",
    "HutchinsonDiagonal",
    "Identity",
    "IdentityOperator",
    "LossGraph",
    "Needs",
    "Observation",
    "Operator",
    "Problem",
    "Registry",
    "SingularCurvatureError",
    "State",
    "Statistics",
    "UnknownNameError",
    "estimate",
    "estimators",
]
