"""Certificates: by smoothing against changes of the input, by partitions against poisoned training data."""

from sanitize.certify.certificates import Certificates
from sanitize.certify.ensemble import PartitionConfig, PartitionEnsemble, PartitionFilterConfig, train_partitions
from sanitize.certify.partition import certified_poisons
from sanitize.certify.partition_stage import certify_partitions
from sanitize.certify.smoothing import SmoothingConfig, certify, lower_bound, predict, radius
from sanitize.certify.smoothing_stage import CertifySmoothingConfig, certify_smoothing

__all__ = [
    "Certificates",
    "CertifySmoothingConfig",
    "PartitionConfig",
    "PartitionEnsemble",
    "PartitionFilterConfig",
    "SmoothingConfig",
    "certified_poisons",
    "certify",
    "certify_partitions",
    "certify_smoothing",
    "lower_bound",
    "predict",
    "radius",
    "train_partitions",
]
