"""Training tasks, registered by name: batches, loss, metric and report of each; and generators of synthetic tasks.

The generators need numpy only; everything else imports torch on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgrn2.tasks.base import Metric, ReportFigure, StepLoss, Task, TaskBase, TaskContext, TaskReport
    from hgrn2.tasks.classification import ClassificationOptions, ClassificationTask, classification_loss
    from hgrn2.tasks.distillation import DistillationTask
    from hgrn2.tasks.generators import GENERATORS, Examples, SyntheticOptions, generate, register_generator, show
    from hgrn2.tasks.language import LanguageTask
    from hgrn2.tasks.options import TaskOptions
    from hgrn2.tasks.registry import TASKS, find_task, register_task
    from hgrn2.tasks.synthetic import SyntheticTask, register_synthetic_task

__all__ = [
    "GENERATORS",
    "TASKS",
    "ClassificationOptions",
    "ClassificationTask",
    "DistillationTask",
    "Examples",
    "LanguageTask",
    "Metric",
    "ReportFigure",
    "StepLoss",
    "SyntheticOptions",
    "SyntheticTask",
    "Task",
    "TaskBase",
    "TaskContext",
    "TaskOptions",
    "TaskReport",
    "classification_loss",
    "find_task",
    "generate",
    "register_generator",
    "register_synthetic_task",
    "register_task",
    "show",
]

# modules of public names; all others are in hgrn2.tasks.base
_HOMES = {
    "ClassificationOptions": "classification",
    "ClassificationTask": "classification",
    "DistillationTask": "distillation",
    "LanguageTask": "language",
    "SyntheticTask": "synthetic",
    "TASKS": "registry",
    "TaskOptions": "options",
    "classification_loss": "classification",
    "find_task": "registry",
    "register_synthetic_task": "synthetic",
    "register_task": "registry",
} | dict.fromkeys(
    ("GENERATORS", "Examples", "SyntheticOptions", "generate", "register_generator", "show"), "generators"
)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        # options of a generator, e.g. MQAROptions
        generators = import_module("hgrn2.tasks.generators")
        if name in generators.__all__:
            return getattr(generators, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "base")
    if home == "registry":
        # all tasks of the package must be known before TASKS is read, or a task of another package registers
        import_module("hgrn2.tasks.registry").load_tasks()
    return getattr(import_module(f"hgrn2.tasks.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
