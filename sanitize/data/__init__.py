"""Shards: finding, reading untrusted ones, indexing, streaming, and copying samples byte for byte."""
