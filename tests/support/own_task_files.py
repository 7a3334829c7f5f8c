"""Task files in lm-eval's format, as a user writes them."""

from __future__ import annotations

import json

import yaml

QUESTION = {
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "q",
    "doc_to_choice": "a",
    "doc_to_target": "gold",
}
"""A question with several answers; the fields are those of `write_rows`."""


def write_rows(folder, answers, name="own"):
    """Write six questions, and return what names them in a task file."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"q": f"The house of number {i} is", "a": answers, "gold": i % 2, "other": f"number {i}"}
        for i in range(6)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}


def write_task(folder, name, settings, functions=""):
    """Write a task file; `functions` are lines of YAML that name Python functions."""
    text = yaml.safe_dump({"task": name, **settings}, sort_keys=False) + functions
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def own_task(folder, answers, **changes):
    """Write a task file of the user's, with a prompt that its own Python file computes."""
    source = write_rows(folder, answers)
    (folder / "helpers.py").write_text("def prompt(doc):\n    return doc['q'].upper()\n", encoding="utf-8")
    settings = {key: value for key, value in QUESTION.items() if key != "doc_to_text"} | source | changes
    return write_task(folder, "own", settings, "doc_to_text: !function helpers.prompt\n")
