"""What can be proved: randomized smoothing, against changes of the input."""

from sanitize.certify.smoothing import SmoothingConfig, certify, lower_bound, predict, radius
from sanitize.certify.smoothing_stage import (
    CertifySmoothingConfig,
    SmoothedCertificates,
    certified_accuracy,
    certify_smoothing,
)

__all__ = [
    "CertifySmoothingConfig",
    "SmoothedCertificates",
    "SmoothingConfig",
    "certified_accuracy",
    "certify",
    "certify_smoothing",
    "lower_bound",
    "predict",
    "radius",
]
