"""Atomic and checksummed writes, JSON that may be damaged, and locks."""
