"""Self-contained HTML pages about a run, made from its artifacts only."""

from sanitize.report.certificates import write_certificate_report
from sanitize.report.condensation import write_condensation_report
from sanitize.report.denoising import write_denoising_report
from sanitize.report.drift import write_drift_report
from sanitize.report.finding import Finding, find
from sanitize.report.leaks import write_leak_report
from sanitize.report.page import Report, ReportConfig, finding_of, write_report
from sanitize.report.redteam import write_redteam_report
from sanitize.report.robustness import write_robustness_report
from sanitize.report.training import write_training_report

__all__ = [
    "Finding",
    "Report",
    "ReportConfig",
    "find",
    "finding_of",
    "write_certificate_report",
    "write_condensation_report",
    "write_denoising_report",
    "write_drift_report",
    "write_leak_report",
    "write_redteam_report",
    "write_report",
    "write_robustness_report",
    "write_training_report",
]
