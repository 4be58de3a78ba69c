"""Train a classifier on a condensed set with PyTorch Lightning; `sanitize` is not needed.

pip install lightning
python examples/train_on_condensed_lightning.py runs/condensed/70-condensed [--epochs 300]
"""

import argparse
from pathlib import Path

import lightning
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2


class Classifier(lightning.LightningModule):
    """Two blocks of convolution, instance norm, ReLU and average pooling, and one Linear."""

    def __init__(self, channels: int, n_classes: int, width: int = 128) -> None:
        super().__init__()
        self.network = nn.Sequential()
        for inputs in (channels, width):
            self.network.extend([nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU()])
            self.network.append(nn.AvgPool2d(2))
        self.network.extend([nn.Flatten(), nn.LazyLinear(n_classes)])
        self.change = v2.RandomAffine(degrees=15, translate=(0.125, 0.125), scale=(0.8, 1.2))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """Cross-entropy of images that look a little different each time."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(self.change(images)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Load, train, and see what was learned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("condensed", type=Path, help="folder that `sanitize condense` made")
    parser.add_argument("--epochs", type=int, default=300)
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)

    tensors = load_file(options.condensed / "condensed.safetensors")
    images, labels = tensors["images"], tensors["labels"]  # (N, C, H, W) float32, normalised; (N,) int64
    model = Classifier(images.shape[1], int(labels.max()) + 1)
    model.network(images[:1])  # the last layer learns its size
    batches = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)

    model.eval().cpu()
    with torch.inference_mode():
        accuracy = (model.network(images).argmax(1) == labels).float().mean()
    print(f"accuracy on the condensed images {accuracy:.3f}")


if __name__ == "__main__":
    main()
