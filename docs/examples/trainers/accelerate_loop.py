"""Accelerate: accumulation over two micro-batches, and AdaHessian, which needs the loss's graph."""

import torch
from accelerate import Accelerator

from optimizers import AdaHessian
from optimizers.integrations import AccelerateHook

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
x = torch.randn(64, 4)
y = (x @ torch.randn(4, 3)).argmax(1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, AdaHessian(model.parameters(), lr=0.05), loader)
AccelerateHook(accelerator, optimizer)

history = []
for _ in range(10):
    for inputs, target in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        history.append(float(loss.detach()))
print(f"loss {history[0]:.4f} -> {history[-1]:.4f}")
