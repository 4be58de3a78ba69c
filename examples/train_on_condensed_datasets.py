"""Train a classifier on a condensed set that is read with Hugging Face datasets; `sanitize` is not needed.

    pip install datasets
    python examples/train_on_condensed_datasets.py runs/condensed/70-condensed [--epochs 300]

A row has `npy` (the exact image, float32, normalised), `png` (the image in 8 bits) and `cls` (the class).
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from torch import nn
from torchvision.transforms import v2

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("condensed", type=Path, help="folder that `sanitize condense` made")
parser.add_argument("--epochs", type=int, default=300)
options = parser.parse_args()

info = json.loads((options.condensed / "dataset.json").read_text())
shards = [str(options.condensed / name) for name in info["shards"]]
rows = load_dataset("webdataset", data_files={"train": shards}, split="train")
rows = rows.select_columns(["npy", "cls"]).with_format("torch")[:]  # all of them: they are few
images, labels = rows["npy"].float(), rows["cls"]  # (N, C, H, W) normalised; (N,) int64

torch.manual_seed(0)
channels, height, width = info["image"]["shape"]
model = nn.Sequential(
    nn.Conv2d(channels, 128, 3, padding=1),
    nn.GroupNorm(128, 128),
    nn.ReLU(),
    nn.AvgPool2d(2),
    nn.Conv2d(128, 128, 3, padding=1),
    nn.GroupNorm(128, 128),
    nn.ReLU(),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(128 * (height // 4) * (width // 4), info["n_classes"]),
)
# So few images are soon known by heart: show them a little differently each time.
change = v2.RandomAffine(degrees=15, translate=(0.125, 0.125), scale=(0.8, 1.2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for _ in range(options.epochs):
    for batch in torch.randperm(len(images)).split(64):
        loss = nn.functional.cross_entropy(model(change(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
with torch.inference_mode():
    accuracy = (model(images).argmax(1) == labels).float().mean()
print(f"loss {loss.item():.3f}, accuracy on the condensed images {accuracy:.3f}")
