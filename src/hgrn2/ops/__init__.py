"""Scans and steps of gated linear recurrences: pure functions on tensors."""

from hgrn2.ops.backends import check_backend, resolve_backend
from hgrn2.ops.linear_scan import linear_scan
from hgrn2.ops.scan import gated_scan, hgrn2_scan, hgrn2_step
from hgrn2.ops.selective_scan import selective_scan

__all__ = [
    "check_backend",
    "gated_scan",
    "hgrn2_scan",
    "hgrn2_step",
    "linear_scan",
    "resolve_backend",
    "selective_scan",
]
