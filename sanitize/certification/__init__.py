"""Certificates: by smoothing against changes of the input, by partitions against poisoned training data."""

from sanitize.certification.certificates import Certificates
from sanitize.certification.ensemble import PartitionConfig, PartitionEnsemble, PartitionFilterConfig, train_partitions
from sanitize.certification.partition import certified_poisons
from sanitize.certification.partition_stage import certify_partitions
from sanitize.certification.smoothing import SmoothingConfig, certify, lower_bound, predict, radius
from sanitize.certification.smoothing_stage import CertifySmoothingConfig, certify_smoothing

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
