"""Trains under a strategy that nobody has imported: `script.py PACKAGE`, `lightning` or `pytorch_lightning`."""

import sys
from importlib import import_module
from typing import Any


def train(package: str, **options: Any) -> tuple[str, float, list[float]]:
    """The strategy's class, what was logged last, and the trained weights."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    L: Any = import_module(package)

    class Net(L.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.second(self.first(batch[0]).tanh()).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    L.seed_everything(3)
    module, data = Net(), DataLoader(TensorDataset(torch.randn(24, 4)), 8, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, **quiet, **options)
    trainer.fit(module, data)
    loaded = {name for name in ("lightning", "lightning_lwpm") if name in sys.modules}
    assert package == "lightning" or not loaded, loaded
    kind = f"{type(trainer.strategy).__module__}.{type(trainer.strategy).__name__}"
    weights = [value for p in module.parameters() for value in p.detach().flatten().tolist()]
    return kind, float(trainer.callback_metrics["loss"]), weights


if __name__ == "__main__":
    from lightning_lwpm_autoload import autoload

    autoload()  # as `import torch` does where the library is installed
    assert "torch" not in sys.modules
    sys.stdout.write(f"RESULT {train(sys.argv[1], strategy='lwpm', devices=2)!r}\n")
    sys.stdout.flush()
