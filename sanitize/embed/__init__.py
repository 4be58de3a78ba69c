"""The suspect model and what it sees: train a classifier on the untrusted data, or load one, and embed every sample.

A backdoor must be learned to be seen: the embedder is trained on the poisoned data on purpose, and is thrown away.
"""

from sanitize.embed.embedder import EmbedderConfig, train_embedder
from sanitize.embed.stage import EmbedConfig, embed_shards
from sanitize.embed.table import TableConfig, import_table

__all__ = [
    "EmbedConfig",
    "EmbedderConfig",
    "TableConfig",
    "embed_shards",
    "import_table",
    "train_embedder",
]
