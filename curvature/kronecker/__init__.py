"""Kronecker-factored curvature: estimators, their operator, and the rules for layers."""

from curvature.kronecker.ekfac import EKFAC
from curvature.kronecker.kfac import KFAC
from curvature.kronecker.operator import KroneckerOperator
from curvature.kronecker.rules import Dims, LayerRule, register_rule

__all__ = ["EKFAC", "KFAC", "Dims", "KroneckerOperator", "LayerRule", "register_rule"]
