"""report.html: what a run did, on one page that needs no network and no other file."""

from hgrn2.train.report.page import REPORT_NAME, write_report

__all__ = ["REPORT_NAME", "write_report"]
