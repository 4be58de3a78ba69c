"""Hygiene of a data set: copies, leaks, images of low quality, wrong hashes; before any model."""

from sanitize.hygiene.quality import QualityConfig
from sanitize.hygiene.stage import HygieneConfig, check_hygiene

__all__ = ["HygieneConfig", "QualityConfig", "check_hygiene"]
