"""`sanitize certify`."""

from typing import Any

from flows.cli.app import print_certificates, print_leaks, print_places, say
from flows.cli.command import ALLOW_FACTORY, MODEL, Option, job_command


@job_command(
    MODEL,
    Option("--sigma", float, "smoothing.sigma", "Noise, as a share of the range of pixels (default 0.25)."),
    Option(
        "--n",
        int,
        "smoothing.n",
        "Noisy copies of an image (default 10000). The largest possible radius is sigma Phi^-1(alpha^(1/n)): at alpha "
        ".001 nothing for n < 10, 0.55 sigma for 20, 1.51 sigma for 100, 2.47 sigma for 1000, 3.2 sigma for 10000.",
    ),
    Option(
        "--max-images", int, "smoothing.max_images", "Number of samples to certify, chosen by a hash (default 500)."
    ),
    ALLOW_FACTORY,
    out="runs/certify",
)
def certify(result: dict[str, Any], out: str) -> None:
    """Prove bounds within which the predictions of a model cannot change, and write them into a model package.

    A single network is smoothed: no change of an image that is shorter than the radius changes its prediction (train
    with `train.optim.noise_sd` at the same sigma, or little will be certified). An ensemble of `sanitize train
    --partitions` is certified by its votes: the radius is a number of poisoned training samples. A model whose training
    run is still there is checked for test pictures among its training samples.

    Examples:

        sanitize certify runs/robust --shards 'data/test-*.tar' --sigma 0.25 --max-images 500

        sanitize certify runs/ensemble/80-package --shards 'data/test-*.tar' --out runs/certified
    """
    print_leaks(result.pop("test_leaks"), out)
    if unchecked := result.pop("leaks_unchecked"):
        say("note", "yellow", f"whether the model was trained on test pictures was not checked: {unchecked}")
    print_certificates(result.pop("certificates"))
    print_places(result)
