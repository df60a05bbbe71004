"""Data of Long Range Arena (arXiv 2011.04006): readers of its files, and Pathfinder images."""
