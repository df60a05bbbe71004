"""Files that are read line by line, as rows with the keys that the tasks ask for."""

import json

from datasets import Dataset


def hellaswag(lines: Dataset) -> Dataset:
    """Six lines an item: the beginning, the number of the right end, and four ends."""
    text = list(lines["text"])
    rows = [text[i : i + 6] for i in range(0, len(text) - 5, 6)]
    return Dataset.from_list([{"query": query, "gold": int(gold), "choices": ends} for query, gold, *ends in rows])


def blimp(lines: Dataset) -> Dataset:
    """An object a line, of whose keys some are in some files only."""
    rows = [json.loads(line) for line in lines["text"]]
    return Dataset.from_list([{key: row[key] for key in ("UID", "sentence_good", "sentence_bad")} for row in rows])
