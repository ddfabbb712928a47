"""K-FAC for the equalised linear layer (Karras et al. 2018, arXiv 1710.10196): y = (c W) a + b with c = 1/√d_in.

The weights are kept at unit variance and scaled when they are used, so a library that looks for ``nn.Linear`` finds
none, and a rule that took the layer for one would be wrong by c² in the factor A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvature.kronecker import LayerRule


class EqualizedLinear(nn.Module):
    """y = (c W) a + s b.

    Args:
        d_in: entries of a.
        d_out: entries of y.
        bias_scale: s.
    """

    def __init__(self, d_in: int, d_out: int, bias_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self.scale = d_in**-0.5
        self.bias_scale = bias_scale

    def forward(self, a: Tensor) -> Tensor:
        return nn.functional.linear(a, self.scale * self.weight, self.bias_scale * self.bias)


class EqualizedLinearRule(LayerRule):
    """Rows of inputs are c a; everything else is a linear layer's.

    The gradient at W is Σ_p g_p (c a_p)ᵀ. The block [W, b] has the rows [c a; 1], which holds for s = 1 only: another
    s is refused, and the layer is then treated by the exact diagonal.
    """

    layers = (EqualizedLinear,)

    def refuse(self, module: nn.Module) -> str | None:
        assert isinstance(module, EqualizedLinear)
        return None if module.bias_scale == 1.0 else f"bias_scale must be 1, got {module.bias_scale}"

    def input_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        assert isinstance(module, EqualizedLinear)
        return super().input_rows(module, (module.scale * inputs[0],))
