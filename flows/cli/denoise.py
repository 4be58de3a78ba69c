"""`sanitize denoise`."""

from typing import Annotated

import typer

from flows.cli.app import (
    AsJson,
    ConfigFile,
    Device,
    Direct,
    Out,
    Quiet,
    Seed,
    Shards,
    bars,
    console,
    errors,
    print_json,
    print_places,
    set_compute,
    settings_of,
)


def denoise(
    config: ConfigFile = None,
    shards: Shards = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many principal components.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep those with this share of the variance, e.g. 0.97.")] = None,
    mode: Annotated[str | None, typer.Option(help="noise (default), or pca: nothing in place of the rest.")] = None,
    member: Annotated[str | None, typer.Option(help="png (default; 8 bits, clipped) or npy (exact floats).")] = None,
    out: Out = "runs/denoise",
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write shards whose images have no small-scale features, and noise where those were (PCA-noise).

    A network that learns from them needs larger perturbations to be fooled. Test images stay as they are. To have the
    noise drawn anew in every epoch instead of once, train with `train.denoise` (see configs/).

    Examples:

        sanitize denoise --shards 'data/train-*.tar' --energy 0.97 --out runs/denoised

        sanitize train --shards 'runs/denoised/20-denoised/shards/*.tar' --out runs/robust
    """
    from flows.start import start
    from sanitize.jobs.denoise import DenoiseRunConfig

    with errors():
        settings = settings_of(config, shards=shards)
        given = {"dims": dims, "energy": energy, "mode": mode, "member": member}
        settings["denoise"] = dict(settings.get("denoise") or {}) | {k: v for k, v in given.items() if v is not None}
        set_compute(settings, seed=seed, device=device)
        with bars(quiet):
            result = start(DenoiseRunConfig.model_validate(settings), out, direct)
    if as_json:
        print_json(result)
        return
    console.print(f"{result.pop('samples'):,} samples", highlight=False)
    print_places(result)
