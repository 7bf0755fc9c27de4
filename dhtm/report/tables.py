"""A table as CSV for machines, and as Markdown and LaTeX for readers."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.core.files import write_atomically
from dhtm.report.registry import title_of
from dhtm.report.statistics import LEVEL
from dhtm.report.style import save_figure

DASH = "–"
FAITHFULNESS = ["kl", "kl_low", "kl_high", "agreement", "agreement_low", "agreement_high", "flips_won", "flips_lost"]
_ESCAPES = {"%": r"\%", "_": r"\_", "−": "$-$", DASH: "--", "×": r"$\times$", "Δ": r"$\Delta$", "<": "$<$"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        data: all numbers, one row per result; NaN where there is no number.
        parts: the parts that readers see, each a caption and a frame of strings. A column "run" has the run that a row comes
            from; only the web page shows it.
        notes: sentences below the parts.
    """

    data: pd.DataFrame
    parts: list[tuple[str, pd.DataFrame]]
    notes: list[str]

    def save(self, path: Path, figure: Figure | None = None) -> None:
        """Write ``path`` with the endings .csv, .md and .tex and, for a figure, .pdf and .png."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending, text in (
            (".csv", self.data.to_csv(index=False, float_format="%.8g")),
            (".md", self.markdown()),
            (".tex", self.latex()),
        ):
            write_atomically(path.with_suffix(ending), lambda file, text=text: file.write_text(text, encoding="utf-8"))
        if figure is not None:
            save_figure(figure, path)

    def _formatted_parts(self) -> list[tuple[str, pd.DataFrame]]:
        return [(caption, frame.drop(columns="run", errors="ignore")) for caption, frame in self.parts]

    def markdown(self) -> str:
        parts = [
            f"**{caption}**\n\n{frame.to_markdown(index=False, disable_numparse=True, colalign=['right'] * frame.shape[1])}\n"
            for caption, frame in self._formatted_parts()
        ]
        return "\n".join([*parts, *(f"- {note}" for note in self.notes)]) + "\n"

    def latex(self) -> str:
        """Return one booktabs ``table`` per part; the document needs \\usepackage{booktabs}."""
        tables = []
        for caption, frame in self._formatted_parts():
            escaped = frame.rename(columns=_latex).map(_latex)
            tabular = escaped.to_latex(index=False, column_format="r" * frame.shape[1])
            tables.append(f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(caption)}}}\n{tabular}\\end{{table}}\n")
        notes = "\n".join(f"\\item {_latex(note)}" for note in self.notes)
        return "\n".join(tables) + (f"\n\\begin{{itemize}}\n{notes}\n\\end{{itemize}}\n" if self.notes else "")


def caption_of(backbone: str, data: str, n_images: pd.Series, *details: str) -> str:
    """Return a part's caption, with the number of images if there are runs."""
    counts = n_images.dropna()
    images = [] if counts.empty else [f"{int(counts.max()):,} images"]
    return ", ".join([title_of(backbone, data), *images, *details])


def number(value: float, decimals: int, signed: bool = False) -> str:
    """Format a number with a true minus sign; NaN becomes a dash."""
    return DASH if pd.isna(value) else f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def difference_cells(row, other: str) -> dict[str, str]:
    """Return the cells that compare a row's KL and top-1 with another's.

    Args:
        row: has the columns of ``statistics.compare`` and of Holm's correction.
        other: what the row is compared with, for the headings.
    """
    kl = (row.kl_difference, row.kl_difference_low, row.kl_difference_high)
    top1 = (row.difference, row.difference_low, row.difference_high)
    return {
        f"KL − {other}, nats": with_interval(*kl, two_digits(row.kl_difference), signed=True),
        "p": p_cell(row.kl_p, row.kl_p_holm),
        "top-1 %": number(row.top1, 2),
        f"top-1 − {other}, points": with_interval(*top1, signed=True),
        "p (top-1)": p_cell(row.p, row.p_holm),
    }


def faithfulness_cells(row: Any) -> dict[str, str]:
    """Return the cells of a run's KL and agreement with the unmerged model, each with its interval."""
    return {
        "KL, nats [95% interval]": with_interval(row.kl, row.kl_low, row.kl_high, two_digits(row.kl)),
        "agreement % [95% interval]": with_interval(row.agreement, row.agreement_low, row.agreement_high),
    }


def flips_cell(row: Any) -> str:
    """Return the cell of the images that only the merged or only the unmerged model has right."""
    return f"{number(row.flips_won, 0)} / {number(row.flips_lost, 0)}"


def flops_cell(row: Any) -> str:
    """Return the cell of a run's GFLOPs; where images differ, the mean with quartiles and maximum."""
    decimals = 4 if row.flops_g < 1 else 3
    if pd.isna(row.flops_g_max):
        return number(row.flops_g, decimals)
    spread = with_interval(row.flops_g, row.flops_g_q1, row.flops_g_q3, decimals)
    return f"{spread}, at most {number(row.flops_g_max, decimals)}"


def p_cell(p: float, corrected: float) -> str:
    """Format a p value, with * if it is below LEVEL after correction; NaN becomes a dash."""
    return ("<0.0001" if p < 0.0001 else number(p, 4)) + ("*" if corrected < LEVEL else "")


def two_digits(value: float) -> int:
    """Return the decimals that show two significant digits of a small number, at most six."""
    return 2 if pd.isna(value) or value == 0 else min(6, max(0, 1 - math.floor(math.log10(abs(value)))))


def with_interval(value: float, low: float, high: float, decimals: int = 2, signed: bool = False) -> str:
    """Format a number and its interval; NaN becomes a dash."""
    shown, first, last = (number(part, decimals, signed) for part in (value, low, high))
    return shown if pd.isna(value) else f"{shown} [{first}, {last}]"


def _latex(text: str) -> str:
    return text.translate(str.maketrans(_ESCAPES))
