"""Checkpoints of every published layout: which one a folder has, to our model, and back."""
