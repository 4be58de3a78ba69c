"""Standard measures of detectors and models, and of models under attack."""

from sanitize.measure.evasion import EvasionConfig, evade, smallest_perturbation
from sanitize.measure.leaking import Leaking, gradient_leaking
from sanitize.measure.metrics import Correct, Detection, accuracy, attack_success_rate, auroc, count_correct, detection
from sanitize.measure.robustness import Robustness, RobustnessConfig, measure_robustness

__all__ = [
    "Correct",
    "Detection",
    "EvasionConfig",
    "Leaking",
    "Robustness",
    "RobustnessConfig",
    "accuracy",
    "attack_success_rate",
    "auroc",
    "count_correct",
    "detection",
    "evade",
    "gradient_leaking",
    "measure_robustness",
    "smallest_perturbation",
]
