"""The law of layer rules, and K-FAC against the exact Gauss-Newton matrix where the two are equal."""

import pytest
import torch
from soaa_equalized_linear import EqualizedLinear
from torch import nn

from curvature import KFAC, GaussNewton, estimate
from curvature.kronecker.testing import check_layer_rule


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)], ids=["samples", "sequences"])
def test_rows_multiply_to_the_gradient(shape):
    torch.manual_seed(0)
    check_layer_rule(EqualizedLinear(5, 4).double(), torch.randn(shape, dtype=torch.float64))


def test_kfac_equals_gauss_newton_for_one_sample_without_a_registration_in_this_program():
    torch.manual_seed(0)
    model = EqualizedLinear(4, 3).double()
    batch = (torch.randn(1, 4, dtype=torch.float64), torch.tensor([1]))
    loss_fn = nn.CrossEntropyLoss()
    kronecker = estimate(KFAC(model), model, loss_fn, [batch]).to_dense()
    exact = estimate(GaussNewton(), model, loss_fn, [batch]).to_dense()
    torch.testing.assert_close(kronecker, exact)


def test_a_scaled_bias_is_refused_and_falls_back_to_the_diagonal():
    model = EqualizedLinear(4, 3, bias_scale=0.5).double()
    with pytest.raises(AssertionError, match="a rule covers the layer"):
        check_layer_rule(model, torch.randn(6, 4, dtype=torch.float64))
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))
    with pytest.warns(UserWarning, match="bias_scale must be 1, got 0.5"):
        found = estimate(KFAC(model), model, nn.CrossEntropyLoss(), [batch]).to_dense()
    exact = estimate(GaussNewton(), model, nn.CrossEntropyLoss(), [batch]).to_dense()
    torch.testing.assert_close(found, torch.diag(exact.diagonal()))
