"""`sanitize denoise`."""

from typing import Any

from flows.cli.app import console, print_places
from flows.cli.command import Option, job_command
from sanitize.plural import counted


@job_command(
    Option("--dims", int, "denoise.dims", "Number of principal components to keep."),
    Option("--energy", float, "denoise.energy", "Share of the variance to keep, such as 0.97; instead of --dims."),
    Option("--mode", str, "denoise.mode", "noise (default), or pca: nothing in place of the dropped components."),
    Option("--member", str, "denoise.member", "png (default; 8 bits, clipped) or npy (exact floats)."),
    out="runs/denoise",
)
def denoise(result: dict[str, Any], out: str) -> None:
    """Write training images without small-scale features, with noise in their place (PCA-noise).

    A network trained on these images needs larger perturbations to be fooled. Test images stay as they are. To draw new
    noise in every epoch instead of once, train with `train.denoise` (see configs/).

    Examples:

        sanitize denoise --shards 'data/train-*.tar' --energy 0.97 --out runs/denoised

        sanitize train --shards 'runs/denoised/20-denoised/shards/*.tar' --out runs/robust
    """
    console.print(counted(result.pop("samples"), "sample"), highlight=False)
    print_places(result)
