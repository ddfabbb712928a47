"""The laws of estimators, the factored matrix by hand, and a training run by name."""

import pytest
import torch
from soaa_factored_fisher import FactoredFisher

from curvature import Observation
from curvature.testing import LAWS, check_estimator
from optimizers import available, build


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    check_estimator(FactoredFisher, semidefinite=True, only=[law])


def test_a_rank_one_square_is_kept_exactly_and_any_other_keeps_its_row_and_column_sums():
    generator = torch.Generator().manual_seed(0)
    r, c = torch.rand(4, 1, generator=generator).double(), torch.rand(1, 6, generator=generator).double()
    G = torch.randn(4, 6, generator=generator).double()
    for gradient, exact in ((r * c, True), (G, False)):
        estimator = FactoredFisher()
        state = estimator.init([gradient])
        estimator.update(state, Observation(gradient=[gradient]))
        (V,) = estimator.operator(state).diagonal()
        torch.testing.assert_close(V.sum(0), gradient.square().sum(0))
        torch.testing.assert_close(V.sum(1), gradient.square().sum(1))
        assert torch.allclose(V, gradient.square()) == exact


def test_the_name_is_found_and_trains():
    assert "factored-fisher" in available()["curvature"]
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 10)
    optimizer = build(model, curvature="factored-fisher", trust_region="rms-box", lr=1e-2)
    x, y = torch.randn(64, 20), torch.randint(10, (64,))
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
