"""The operator: pure functions on tensors."""

from hgrn2.ops.scan import gated_scan, hgrn2_scan, hgrn2_step, resolve_backend

__all__ = ["gated_scan", "hgrn2_scan", "hgrn2_step", "resolve_backend"]
