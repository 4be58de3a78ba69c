"""Settings of the statistics of seen samples."""

from pydantic import BaseModel, ConfigDict, Field


class StatisticsConfig(BaseModel):
    """Statistics of seen samples; the same settings for all versions of a reference.

    Attributes:
        embedding: name of the embedding whose moments are compared. `gradients` and `pixels` depend on neither labels
            nor model, so new clean samples have the same distribution. A network embeds its training samples more
            tightly than new ones, so `penultimate` of the approved run's own model finds drift in every batch.
        n_components: most principal components of the embedding.
        per_class: samples of a class stored with all their embeddings: half to fit scorers on, half to calibrate their
            thresholds.
        max_rows: samples stored of all classes together; with many classes, `per_class` becomes smaller.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedding: str = "gradients"
    n_components: int = Field(default=32, ge=1)
    per_class: int = Field(default=2_000, ge=2)
    max_rows: int = Field(default=100_000, ge=2)

    def rows_of_class(self, n_classes: int) -> int:
        """Rows of one class in each of the two halves."""
        return max(1, min(self.per_class, self.max_rows // n_classes) // 2)
