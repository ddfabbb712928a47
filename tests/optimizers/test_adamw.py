"""With the Fisher branch off and the radius held at 1, the composition is torch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch

from optimizers import AdamW


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("betas", "weight_decay"), [((0.9, 0.999), 1e-2), ((0.5, 0.9), 0.0), ((0.0, 0.99), 0.3)]
)
def test_composition_equals_torch_adamw(
    betas: tuple[float, float], weight_decay: float, maximize: bool
) -> None:
    ours, theirs = network(), network()
    a = AdamW(ours.parameters(), lr=1e-2, betas=betas, weight_decay=weight_decay, maximize=maximize)
    b = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=betas, weight_decay=weight_decay, maximize=maximize
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_layer_frozen_at_first_equals_torch_adamw_after_it_thaws() -> None:
    ours, theirs = network(), network()
    a, b = AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for t in range(40):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        for model, optimizer in ((ours, a), (theirs, b)):
            model[0].requires_grad_(t >= 20)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_resume_is_bit_exact() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(20)]
    for x in data[:10]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = AdamW(other.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in data[10:]:
        for m, o in ((model, optimizer), (other, resumed)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
