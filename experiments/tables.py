"""What the experiments' tables have in common: CSV for programs, Markdown for people, written whole or not at all."""

import csv
import io

from ddpm.runs import write_atomically


def write_csv(path, rows):
    """Rows (dictionaries) as CSV; a column for each name that any of them has, in order of appearance."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path):
    """The rows of such a table, numbers as int or float, what is missing left out; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{name: _number(text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def markdown_table(header, rows):
    """A Markdown table of strings, without a last newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_text(path, text):
    """A text file, replaced in one step."""
    write_atomically(path, lambda file: file.write(text.encode()))
