"""One self-contained HTML page about a run, made from its artifacts only."""

from sanitize.report.page import Report, ReportConfig, write_report

__all__ = ["Report", "ReportConfig", "write_report"]
