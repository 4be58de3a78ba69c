"""`sanitize certify`."""

from typing import Annotated

import typer

from flows.cli.app import (
    AllowFactory,
    AsJson,
    ConfigOption,
    Device,
    Direct,
    ModelFolder,
    Out,
    Quiet,
    Seed,
    Shards,
    bars,
    errors,
    print_json,
    print_places,
    print_proved,
    set_compute,
    settings_of,
)


def certify(
    model: ModelFolder,
    config: ConfigOption = None,
    shards: Shards = None,
    sigma: Annotated[
        float | None, typer.Option(help="Noise, as a share of the range of pixels (default 0.25).")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="Noisy copies of an image (default 10000). The largest radius there can be is sigma "
            "Phi^-1(alpha^(1/n)): at alpha .001 nothing for n < 10, 0.55 sigma for 20, 1.51 sigma for 100, 2.47 sigma "
            "for 1000, 3.2 sigma for 10000."
        ),
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Certify so many samples, chosen by a hash.")] = None,
    out: Out = "runs/certify",
    allow_factory: AllowFactory = False,
    direct: Direct = False,
    seed: Seed = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove what cannot change about the predictions of a model, and write it into a model package.

    One network is smoothed: its radius is a distance that no change of the image is seen across (train it with
    `optim.noise_sd` at the same sigma, or little will be certified). An ensemble of `sanitize train --partitions` is
    certified by its votes: its radius is a number of poisoned training samples.

    Examples:

        sanitize certify runs/robust --shards 'data/test-*.tar' --sigma 0.25 --max-images 500

        sanitize certify runs/ensemble/80-package --shards 'data/test-*.tar' --out runs/certified
    """
    from flows.start import start
    from sanitize.jobs.certify import CertifyRunConfig

    with errors():
        settings = settings_of(config, model=model, shards=shards, allow_factory=allow_factory)
        given = {"sigma": sigma, "n": n, "max_images": max_images}
        settings["smoothing"] = settings.get("smoothing", {}) | {k: v for k, v in given.items() if v is not None}
        set_compute(settings, seed=seed, device=device)
        with bars(quiet):
            result = start(CertifyRunConfig.model_validate(settings), out, direct)
    if as_json:
        print_json(result)
        return
    print_proved(result.pop("certificates"))
    print_places(result)
