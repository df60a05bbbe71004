"""The report of a comparison: report.html, report.md, results.csv and pictures."""

from __future__ import annotations

from pathlib import Path

from hgrn2.compare.report.markdown import markdown
from hgrn2.compare.report.page import page
from hgrn2.compare.results import Results, results_csv
from hgrn2.storage.staging import write_text_atomic

REPORT_NAME, MARKDOWN_NAME, CSV_NAME = "report.html", "report.md", "results.csv"


def write_reports(results: Results) -> list[Path]:
    """Write the page, the Markdown, the table of all runs and, if matplotlib is installed, the pictures.

    Args:
        results: what the runs have reached.

    Returns:
        The paths, the page first.
    """
    out = results.out
    # importing matplotlib takes a second
    try:
        from hgrn2.compare.report.pictures import draw
    except ImportError:
        pictures = []
    else:
        pictures = draw(results)
    paths = [out / REPORT_NAME, out / MARKDOWN_NAME, out / CSV_NAME]
    texts = (page(results), markdown(results, pictures), results_csv(results))
    for path, text in zip(paths, texts, strict=True):
        write_text_atomic(path, text)
    return [*paths, *pictures]
