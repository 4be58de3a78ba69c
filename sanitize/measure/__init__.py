"""How good a detector or a model is, by the field's standard measures."""

from sanitize.measure.metrics import Detection, accuracy, attack_success_rate, auroc, detection

__all__ = ["Detection", "accuracy", "attack_success_rate", "auroc", "detection"]
