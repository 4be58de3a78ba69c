"""Training targets: the given labels, or a mixture with the predicted ones. B batch, K classes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class LabelsConfig(BaseModel):
    """Given labels, or bootstrap (Reed et al. 2014; B. Liu 2022, Table 5.5): alpha y + (1 - alpha) prediction.

    The prediction is the class with the largest logit ("hard" bootstrapping). Detached probabilities would have no
    effect: the gradient softmax(o) - alpha y - (1 - alpha) softmax(o) is alpha times the plain one.

    Attributes:
        kind: given or bootstrap.
        alpha: weight of the given label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["given", "bootstrap"] = "given"
    alpha: float = Field(default=0.8, ge=0, le=1)

    def __call__(self, logits_BK: Tensor, y_B: Tensor) -> Tensor:
        """Targets: `y_B`, or detached class probabilities (B, K), float32."""
        if self.kind == "given":
            return y_B
        n_classes = logits_BK.shape[1]
        given_BK = nn.functional.one_hot(y_B, n_classes)
        predicted_BK = nn.functional.one_hot(logits_BK.argmax(1), n_classes)
        return (self.alpha * given_BK + (1 - self.alpha) * predicted_BK).to(logits_BK)
