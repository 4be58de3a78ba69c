"""Embeddings: a suspect model trained on the untrusted data, or loaded; or an encoder trained without labels.

A backdoor can be detected only in a model that has learned it: the suspect model is trained on the poisoned data on
purpose, and is not used for anything else. The encoder of SimCLR is for scorers that must not depend on labels.

To add an embedder: one file with its config, a `FitConfig` with `kind`, `build`, `n_passes` and `once`, and the stage
that `build` returns; and the config in the union `AnyEmbedderConfig`.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from sanitize.embed.canary import CanaryConfig, plant_canaries
from sanitize.embed.embedder import EmbedderConfig, train_embedder
from sanitize.embed.simclr import SimCLRConfig, pretrain_simclr
from sanitize.embed.stage import EMBEDDINGS, EmbedConfig, embed_canaries, embed_shards
from sanitize.embed.table import TableConfig, import_table


def _kind(value: Any) -> Any:
    return value.get("kind", "classifier") if isinstance(value, dict) else getattr(value, "kind", None)


AnyEmbedderConfig = Annotated[
    Annotated[EmbedderConfig, Tag("classifier")] | Annotated[SimCLRConfig, Tag("simclr")], Discriminator(_kind)
]

__all__ = [
    "EMBEDDINGS",
    "AnyEmbedderConfig",
    "CanaryConfig",
    "EmbedConfig",
    "EmbedderConfig",
    "SimCLRConfig",
    "TableConfig",
    "embed_canaries",
    "embed_shards",
    "import_table",
    "plant_canaries",
    "pretrain_simclr",
    "train_embedder",
]
