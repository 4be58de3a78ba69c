"""What is remembered of samples that were seen."""

from pydantic import BaseModel, ConfigDict, Field


class StatisticsConfig(BaseModel):
    """What is remembered of samples that were seen; the same for all versions of a reference.

    Attributes:
        embedding: whose moments are compared. `gradients` and `pixels` know neither labels nor model: to them a clean
            batch looks like the samples before it. What a network was trained on, it embeds more tightly than what it
            sees for the first time, so `penultimate` of the approved run's own model finds drift in every batch.
        n_components: principal components of it that are looked at, at most.
        per_class: samples of a class that are kept with all their embeddings: half to fit scorers on, half to
            calibrate their thresholds.
        max_rows: samples that are kept of all classes together; with more classes, `per_class` is smaller.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding: str = "gradients"
    n_components: int = Field(default=32, ge=1)
    per_class: int = Field(default=2_000, ge=2)
    max_rows: int = Field(default=100_000, ge=2)

    def rows_of_class(self, n_classes: int) -> int:
        """Rows of one class in each of the two halves."""
        return max(1, min(self.per_class, self.max_rows // n_classes) // 2)
