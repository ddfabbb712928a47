"""Lightning: automatic optimization with a judged trial, and manual optimization with SOAA."""

import torch
from lightning.pytorch import LightningModule, Trainer

from optimizers import SOAA, TrustRegionNewton
from optimizers.integrations import SecondOrderModule

torch.manual_seed(0)
x = torch.randn(64, 4)
y = (x @ torch.randn(4, 3)).argmax(1)


class Classifier(SecondOrderModule, LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(4, 3)
        self.history = []

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        loss = torch.nn.functional.cross_entropy(self.layer(inputs), target)
        self.history.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return TrustRegionNewton(self.parameters())


class ManualClassifier(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return SOAA(self.parameters(), lr=0.05, total_steps=12)


for model in (Classifier(), ManualClassifier()):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    trainer = Trainer(
        max_epochs=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    radius = float(trainer.optimizers[0].step_info.radius)
    print(
        f"{type(model).__name__}: loss {model.history[0]:.4f} -> {model.history[-1]:.4f}, radius {radius:.4f}"
    )
