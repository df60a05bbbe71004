"""Pictures of an image classifier: confusions, misclassified images, and what its state attends to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgrn2.errors import MissingPackage
from hgrn2.extras import install_command
from hgrn2.models.vision.contribution import token_contribution
from hgrn2.storage.staging import staged_file

_COLUMNS, _ROWS = 8, 5
_MAPS = 12
# classes beyond these have no room for their names
_NAMED_CLASSES = 40


def draw_pictures(task: Any, model: Any, predictions: Any, folder: Path) -> list[Path]:
    """Draw the pictures of a model on validation images.

    Args:
        task: an `ImageTask`.
        model: the model, in evaluation mode.
        predictions: a `Predictions` of the validation images.
        folder: folder of the pictures.

    Returns:
        Their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage(f"pictures need matplotlib: {install_command('train')}") from error
    true, found, sure = predictions
    names = [str(name) for name in task.class_names]
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"confusion": confusion_figure(Figure, true, found, names)}
    wrong = (true != found).nonzero().flatten()
    if len(wrong):
        # errors with the highest confidence
        rows = wrong[sure[wrong].argsort(descending=True)][: _COLUMNS * _ROWS]
        captions = [f"{names[int(found[i])]} {float(sure[i]):.0%}\nis {names[int(true[i])]}" for i in rows]
        share = f"{len(wrong):,} of {len(true):,} wrong; those with the highest confidence"
        figures["misclassified"] = images_figure(Figure, task.inputs(rows)[0], captions, share)
    # two images of each class, whether correct or not
    order = np.concatenate([np.flatnonzero(true.numpy() == c)[:2] for c in range(min(len(names), _MAPS))])
    rows = torch.from_numpy(order[:_MAPS])
    pixels, inputs = task.inputs(rows)
    with torch.autocast(inputs.device.type, enabled=False):
        maps = token_contribution(task.averaged(model), inputs)
    figures["contribution"] = contribution_figure(
        Figure, pixels, maps.cpu(), [_title(names, true[i], found[i]) for i in rows]
    )
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        with staged_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        paths.append(path)
    return paths


def _title(names: list[str], true: Tensor, found: Tensor) -> str:
    """Return the true class of an image, and the predicted one if it differs."""
    own = names[int(true)]
    return own if true == found else f"{own}\nas {names[int(found)]}"


def confusion_figure(figure_class: Any, true: Tensor, found: Tensor, names: list[str]) -> Any:
    """Draw the confusion matrix, in percent of each row.

    Args:
        figure_class: matplotlib's Figure.
        true: [N] int64, classes of the images.
        found: [N] int64, predicted classes.
        names: names of the classes.
    """
    num = len(names)
    counts = torch.bincount(true * num + found, minlength=num * num).view(num, num).numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3.2 + 0.42 * num)
    figure = figure_class(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    accuracy = counts.diagonal().sum() / max(1, counts.sum())
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"confusions, in percent of a row; accuracy {accuracy:.2%}", loc="left")
    if num <= _NAMED_CLASSES:
        axes.set_xticks(range(num), names, rotation=60, ha="right")
        axes.set_yticks(range(num), names)
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[i, j] > 0.5 else "#333333"
            axes.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return figure


def images_figure(figure_class: Any, pixels: Tensor, captions: list[str], title: str) -> Any:
    """Draw a page of images.

    Args:
        figure_class: matplotlib's Figure.
        pixels: [N, C, H, W] uint8.
        captions: text below each.
        title: heading.
    """
    num_rows = -(-len(captions) // _COLUMNS)
    figure = figure_class(figsize=(_COLUMNS * 1.35, 0.5 + num_rows * 1.75), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for i, axes in enumerate(figure.subplots(num_rows, _COLUMNS, squeeze=False).flat):
        axes.axis("off")
        if i < len(captions):
            _show(axes, pixels[i])
            axes.text(0.5, -0.04, captions[i], transform=axes.transAxes, ha="center", va="top", fontsize=7)
    return figure


def contribution_figure(figure_class: Any, pixels: Tensor, maps: Tensor, names: list[str]) -> Any:
    """Draw images above maps of the contribution of each patch to the predicted class.

    Args:
        figure_class: matplotlib's Figure.
        pixels: [N, C, H, W] uint8.
        maps: [N, rows, columns], from `token_contribution`.
        names: title of each image.
    """
    columns = min(6, len(names))
    num_rows = -(-len(names) // columns)
    figure = figure_class(figsize=(columns * 1.6, 0.6 + num_rows * 3.4), layout="constrained")
    title = "what the state attends to: red patches raise the logit of the predicted class, blue ones lower it"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    grid = figure.subplots(2 * num_rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    height, width = pixels.shape[2:]
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        _show(above, pixels[i])
        above.set_title(name, fontsize=9)
        grey = pixels[i].float().mean(0).cpu().numpy()
        below.imshow(grey, cmap="gray", extent=(0, width, height, 0))
        limit = float(maps[i].abs().max()) or 1.0
        below.imshow(
            maps[i].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65, extent=(0, width, height, 0),
            interpolation="bilinear",
        )  # fmt: skip
    return figure


def _show(axes: Any, pixels: Tensor) -> None:
    image = pixels.cpu().numpy()
    if len(image) == 1:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(image.transpose(1, 2, 0))
