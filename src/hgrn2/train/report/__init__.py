"""Write report.html, a self-contained page about a training run."""

from hgrn2.train.report.page import REPORT_NAME, write_report

__all__ = ["REPORT_NAME", "write_report"]
