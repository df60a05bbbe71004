"""Scans chunk by chunk in plain torch, on any device and for any dtype and width."""
