"""Writing a table as CSV for machines, and as Markdown and LaTeX for readers."""

import dataclasses
from pathlib import Path

import pandas as pd

from dhtm.harness.runs.store import write_atomically

DASH = "–"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        data: all numbers, one row a result; NaN where there is none.
        parts: what readers see: a caption and a frame of strings each.
        notes: sentences to stand below.
    """

    data: pd.DataFrame
    parts: list[tuple[str, pd.DataFrame]]
    notes: list[str]

    def save(self, path: Path) -> None:
        """Write ``path`` with the endings .csv, .md and .tex."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, text in (
            (".csv", self.data.to_csv(index=False, float_format="%.8g")),
            (".md", self.markdown()),
            (".tex", self.latex()),
        ):
            write_atomically(path.with_suffix(ending), lambda file, text=text: file.write_text(text, encoding="utf-8"))

    def markdown(self) -> str:
        parts = [
            f"**{caption}**\n\n{frame.to_markdown(index=False, disable_numparse=True, colalign=['right'] * frame.shape[1])}\n"
            for caption, frame in self.parts
        ]
        return "\n".join([*parts, *(f"- {note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """One booktabs ``table`` a part; needs \\usepackage{booktabs}."""
        tables = []
        for caption, frame in self.parts:
            escaped = frame.rename(columns=_latex).map(_latex)
            tabular = escaped.to_latex(index=False, column_format="r" * frame.shape[1])
            tables.append(f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(caption)}}}\n{tabular}\\end{{table}}\n")
        notes = "\n".join(f"\\item {_latex(note)}" for note in self.notes)
        return "\n".join(tables) + (f"\n\\begin{{itemize}}\n{notes}\n\\end{{itemize}}\n" if self.notes else "")


def number(value: float, decimals: int, signed: bool = False) -> str:
    """A number as readers see it, a dash where there is none; a true minus sign."""
    return DASH if pd.isna(value) else f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """A 95% interval of a percentage."""
    return "" if pd.isna(low) else f" [{low:.2f}, {high:.2f}]"


def _latex(text: str) -> str:
    for plain, escaped in (
        ("%", r"\%"),
        ("_", r"\_"),
        ("−", "$-$"),
        (DASH, "--"),
        ("×", r"$\times$"),
        ("Δ", r"$\Delta$"),
        ("<", "$<$"),
    ):
        text = text.replace(plain, escaped)
    return text
