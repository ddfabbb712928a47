"""Curvature by products alone: the matrix is never formed."""

from curvature.matrix_free.gauss_newton import GaussNewton
from curvature.matrix_free.hessian import Hessian
from curvature.matrix_free.operator import MatrixFreeOperator
from curvature.matrix_free.snapshot import Snapshot

__all__ = ["GaussNewton", "Hessian", "MatrixFreeOperator", "Snapshot"]
