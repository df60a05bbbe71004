"""Training tasks: batches, loss, metric and report of each, registered by name."""

from hgrn2.tasks.base import Metric, ReportFigure, StepLoss, Task, TaskBase, TaskContext, TaskOptions, TaskReport
from hgrn2.tasks.distillation import DistillationTask
from hgrn2.tasks.language import LanguageTask
from hgrn2.tasks.registry import TASKS, find_task, register_task

__all__ = [
    "TASKS",
    "DistillationTask",
    "LanguageTask",
    "Metric",
    "ReportFigure",
    "StepLoss",
    "Task",
    "TaskBase",
    "TaskContext",
    "TaskOptions",
    "TaskReport",
    "find_task",
    "register_task",
]
