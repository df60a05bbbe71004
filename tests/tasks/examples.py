"""Examples as lists, for rules written in plain Python."""

from hgrn2.tasks import generate


def rows(options, count=50, seed=3):
    """Yield inputs and targets of each example."""
    for inputs, targets in zip(*generate(options, count, seed), strict=True):
        yield inputs.tolist(), targets.tolist()
