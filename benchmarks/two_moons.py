"""What anomalies in the training data do to a learned density: Figures 3.2 and 3.3 of RobustRealNVP's source.

    python -m benchmarks.two_moons [--images docs/images] [--json FILE]     2 minutes on one core

Two moons, with 5 % anomalies that are uniform or clustered in one place. RealNVP, TrimRealNVP and RobustRealNVP are
fitted on 2,000 rows, 3 seeds, and scored on 2,000 others of the same mixture; all three with eight couplings, because
four Lipschitz ones are too stiff for moons (LOG.md). Writes one image for each kind of anomalies: the training data,
and the densities of the first seed. Exits with 1 where the order RobustRealNVP >= TrimRealNVP >= RealNVP of the mean
AUC is missed.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import make_moons

from benchmarks.report import conclude, print_table
from sanitize.measure import auroc
from sanitize.score.robust_realnvp import RobustRealNVP, RobustRealNVPConfig

N_ROWS = 2_000
CONTAMINATION = 0.05
SEEDS = range(3)
KINDS = ("uniform", "clustered")
VARIANTS = {
    name: RobustRealNVPConfig(n_couplings=8, max_steps=700, contamination=contamination, lipschitz=lipschitz)
    for name, contamination, lipschitz in (
        ("RealNVP", 0.0, None),
        ("TrimRealNVP", CONTAMINATION, None),
        ("RobustRealNVP", CONTAMINATION, 2.0),
    )
}
LOW, HIGH = np.array([-2.5, -2.0]), np.array([3.5, 2.5])  # what is drawn, and where uniform anomalies lie
PIXELS = (400, 300)  # of one panel
TITLE = 28  # pixels above a panel
COLOURS = np.array([(13, 8, 80), (84, 39, 143), (189, 55, 134), (244, 136, 73), (252, 239, 135)])  # low to high density


def mixture(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, 2) in random order, and whether each is an anomaly (N,); `kind` is "uniform" or "clustered"."""
    rng = np.random.default_rng(seed)
    n_anomalies = round(CONTAMINATION * N_ROWS)
    moons, _ = make_moons(N_ROWS - n_anomalies, noise=0.08, random_state=seed)
    if kind == "uniform":
        anomalies = rng.uniform(LOW, HIGH, (n_anomalies, 2))
    else:
        anomalies = rng.normal((2.5, 1.5), 0.08, (n_anomalies, 2))
    order = rng.permutation(N_ROWS)
    return np.concatenate([moons, anomalies])[order], np.arange(N_ROWS)[order] >= N_ROWS - n_anomalies


def panel(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty panel under its title."""
    image = Image.new("RGB", (PIXELS[0], PIXELS[1] + TITLE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((PIXELS[0] / 2, TITLE / 2), title, fill="black", anchor="mm", font=ImageFont.load_default(17))
    return image, draw


def data_panel(x_ND: np.ndarray, anomalous_N: np.ndarray) -> Image.Image:
    """The rows as dots: blue, anomalies red."""
    image, draw = panel("training data, anomalies red")
    for (x, y), anomalous in zip(x_ND, anomalous_N, strict=True):
        column, row = (np.array([x, y]) - LOW) / (HIGH - LOW) * PIXELS
        draw.circle((column, TITLE + PIXELS[1] - row), 1.5, fill=(200, 30, 30) if anomalous else (70, 110, 190))
    return image


def density_panel(title: str, model: RobustRealNVP) -> Image.Image:
    """Square root of the density, from its lowest to its highest value in the frame."""
    columns, rows = (np.linspace(LOW[i], HIGH[i], PIXELS[i]) for i in (0, 1))
    grid_ND = np.stack(np.meshgrid(columns, rows[::-1]), -1).reshape(-1, 2)
    root_N = (-model.score(grid_ND) / 2).exp().numpy()
    place_N = (root_N - root_N.min()) / (root_N.max() - root_N.min()) * (len(COLOURS) - 1)
    colours_N3 = np.stack([np.interp(place_N, np.arange(len(COLOURS)), COLOURS[:, i]) for i in range(3)], -1)
    image, _ = panel(title)
    image.paste(Image.fromarray(colours_N3.astype(np.uint8).reshape(PIXELS[1], PIXELS[0], 3)), (0, TITLE))
    return image


def draw(path: Path, panels: list[Image.Image]) -> None:
    """Write the panels side by side as one PNG."""
    figure = Image.new("RGB", (len(panels) * (PIXELS[0] + 8) - 8, PIXELS[1] + TITLE), "white")
    for i, image in enumerate(panels):
        figure.paste(image, (i * (PIXELS[0] + 8), 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.save(path, optimize=True)


def main() -> None:
    """Fit, print the table, draw, check the order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    trained = {kind: [mixture(kind, seed) for seed in SEEDS] for kind in KINDS}
    held_out = {kind: [mixture(kind, 1_000 + seed) for seed in SEEDS] for kind in KINDS}
    panels = {kind: [data_panel(*trained[kind][0])] for kind in KINDS}
    rows = []
    for name, config in VARIANTS.items():
        for kind in KINDS:
            models = [config.build().fit(x_ND, seed) for seed, (x_ND, _) in zip(SEEDS, trained[kind], strict=True)]
            aucs = [
                auroc(model.score(x_ND).numpy(), anomalous_N)
                for model, (x_ND, anomalous_N) in zip(models, held_out[kind], strict=True)
            ]
            row = {"anomalies": kind, "method": name, "AUC": float(np.mean(aucs)), "deviation": float(np.std(aucs))}
            rows.append(row)
            panels[kind].append(density_panel(f"{name}, AUC {aucs[0]:.3f}", models[0]))
    missed = []
    for kind in KINDS:
        draw(arguments.images / f"two_moons_{kind}.png", panels[kind])
        means = [row["AUC"] for row in rows if row["anomalies"] == kind]
        if means != sorted(means):
            missed.append(f"order of the AUCs with {kind} anomalies: {means}")
    rows.sort(key=lambda row: KINDS.index(row["anomalies"]))
    print_table(rows, ["anomalies", "method", "AUC", "deviation"], f"two moons, 5 % anomalies, {len(SEEDS)} seeds")
    conclude(missed, arguments.json, start, rows=rows)


if __name__ == "__main__":
    main()
