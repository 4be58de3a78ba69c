"""What sees the samples: a suspect model trained on the untrusted data, or loaded, or an encoder that needs no labels.

A backdoor must be learned to be seen: the suspect model is trained on the poisoned data on purpose, and is thrown away.
SimCLR's encoder sees images alone, for scorers that must not be told the labels.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from sanitize.embed.embedder import EmbedderConfig, train_embedder
from sanitize.embed.simclr import SimCLRConfig, pretrain_simclr
from sanitize.embed.stage import EmbedConfig, embed_shards
from sanitize.embed.table import TableConfig, import_table


def _kind(value: Any) -> Any:
    return value.get("kind", "classifier") if isinstance(value, dict) else getattr(value, "kind", None)


AnyEmbedderConfig = Annotated[
    Annotated[EmbedderConfig, Tag("classifier")] | Annotated[SimCLRConfig, Tag("simclr")], Discriminator(_kind)
]

__all__ = [
    "AnyEmbedderConfig",
    "EmbedConfig",
    "EmbedderConfig",
    "SimCLRConfig",
    "TableConfig",
    "embed_shards",
    "import_table",
    "pretrain_simclr",
    "train_embedder",
]
