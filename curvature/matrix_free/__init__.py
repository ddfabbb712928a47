"""Curvature by products alone: the matrix is never formed."""

from curvature.matrix_free.empirical_fisher import EmpiricalFisher
from curvature.matrix_free.fisher import Fisher
from curvature.matrix_free.gauss_newton import GaussNewton
from curvature.matrix_free.hessian import Hessian
from curvature.matrix_free.operator import MatrixFreeOperator
from curvature.matrix_free.snapshot import Snapshot

__all__ = ["EmpiricalFisher", "Fisher", "GaussNewton", "Hessian", "MatrixFreeOperator", "Snapshot"]
