"""Shards in, shards out: reading what strangers wrote, indexing it, streaming it, and copying it byte for byte."""
