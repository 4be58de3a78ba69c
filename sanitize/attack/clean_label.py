"""Clean-label attack (Turner, Tsipras & Madry, 2019, "Label-Consistent Backdoor Attacks", sections 4.2 and 5).

Images of the target class keep their label and get the trigger. A network would still recognise them by their content
and ignore the trigger; so they are first perturbed against a network, the surrogate, until their content is hard to
recognise. The paper's surrogates are adversarially trained; their perturbations transfer better than those of a plain
network.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from pydantic import Field
from torch import Tensor, nn

from sanitize.attack.attack import Poison, Trigger, to_pixels
from sanitize.attack.badnets import Corner, checkerboard, stamp
from sanitize.attack.size import Size
from sanitize.compute import Compute
from sanitize.errors import ConfigError
from sanitize.measure.evasion import EvasionConfig, evade


class CleanLabelConfig(Trigger):
    """Perturbed images of the target class, with a checkerboard in each corner.

    Attributes:
        target: the class; only its images are eligible, so `rate` cannot exceed its share of the data.
        size: side of each patch, in pixels, or as a share of the shorter side.
        epsilon: largest change of a pixel by the perturbation, of 255; 0 for none.
        steps: steps of projected gradient ascent on the surrogate's cross-entropy.
    """

    keeps_label: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True

    kind: Literal["clean_label", "label_consistent"] = "clean_label"  # two names of one attack
    target: int = 0
    size: Size = 3
    epsilon: int = Field(default=32, ge=0, le=255)
    steps: int = Field(default=20, ge=1, le=10_000)

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Copies of uint8 images with the patches."""
        for corner in get_args(Corner):
            images_BCHW = stamp(images_BCHW, checkerboard, self.size, corner)
        return images_BCHW

    def build(self, surrogate: nn.Module | None, compute: Compute) -> Poison:
        """Perturb images of the target class, then add the patches. Cover samples are not perturbed.

        Args:
            surrogate: logits of float images on [0, 1] (`sanitize.models.pixels.OnPixels`); images it gets wrong are
                not perturbed.
            compute: device, precision, and seed of the random start.

        Raises:
            ConfigError: there is no surrogate.
        """
        if surrogate is None:
            raise ConfigError(f"{self.kind} needs a surrogate: a network trained on such images")
        config = EvasionConfig(norm="linf", radius=self.epsilon / 255, steps=self.steps)

        def poison(images_BCHW: Tensor, labels_B: Tensor, _seeds: Sequence[int]) -> Tensor:
            images_BCHW, of_target_B = images_BCHW.clone(), labels_B == self.target
            if of_target_B.any():
                moved_BCHW = evade(surrogate, images_BCHW[of_target_B], labels_B[of_target_B], config, compute)
                images_BCHW[of_target_B] = to_pixels(255 * moved_BCHW).to(images_BCHW.device)
            return self.apply(images_BCHW)

        return poison
