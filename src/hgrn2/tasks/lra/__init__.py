"""The tasks of Long Range Arena (arXiv 2011.04006)."""

from hgrn2.tasks.lra.base import LRAOptions, LRATask
from hgrn2.tasks.lra.image import ImageSequenceTask
from hgrn2.tasks.lra.listops import ListOpsSequenceTask
from hgrn2.tasks.lra.pathfinder import PathfinderTask, PathXTask
from hgrn2.tasks.lra.text import RetrievalTask, TextTask

__all__ = [
    "ImageSequenceTask",
    "LRAOptions",
    "LRATask",
    "ListOpsSequenceTask",
    "PathXTask",
    "PathfinderTask",
    "RetrievalTask",
    "TextTask",
]
