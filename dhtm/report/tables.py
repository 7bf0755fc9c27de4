"""A table as CSV for machines, and as Markdown and LaTeX for readers."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dhtm.harness.core.files import write_text
from dhtm.harness.models.methods import knob_text
from dhtm.report.registry import entry_of, title_of
from dhtm.report.statistics import LEVEL
from dhtm.report.style import save_figure

DASH = "–"
_ESCAPES = {"%": r"\%", "_": r"\_", "−": "$-$", DASH: "--", "×": r"$\times$", "Δ": r"$\Delta$", "<": "$<$"}

Column = str | tuple[str, Callable[[Any], str]]  # a heading of CELLS, or a heading and a function of a row


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
        write_text(path.with_suffix(".csv"), self.data.to_csv(index=False, float_format="%.8g"))
        write_text(path.with_suffix(".md"), self.markdown())
        write_text(path.with_suffix(".tex"), self.latex())
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


def caption_of_set(frame: pd.DataFrame, *details: str) -> str:
    """Return the caption of a part whose runs have the same images, weights and :func:`conditions`."""
    run = next(frame.itertuples())
    return caption_of(run.backbone, run.data, frame.n_images, f"split {run.split}", *conditions(run), *details)


def conditions(run: Any) -> list[str]:
    """Return a run's number of classes if not all could be predicted, and its dtype if it is not float32."""
    among = [] if pd.isna(run.among) else [f"among {run.among:.0f} classes"]
    return among + ([] if run.dtype == "float32" else [run.dtype])


def cells(frame: pd.DataFrame, *columns: Column) -> pd.DataFrame:
    """Format the rows of a frame for readers."""
    made = dict((column, CELLS[column]) if isinstance(column, str) else column for column in columns)
    return pd.DataFrame([{heading: cell(row) for heading, cell in made.items()} for row in frame.itertuples()])


def difference(heading: str, of: str = "", p: str = "p") -> list[Column]:
    """Return the columns of a difference in top-1 or, with "kl_", in KL, and of its p (headed ``p``)."""

    def shown(row: Any) -> str:
        value, low, high = (getattr(row, f"{of}difference{end}") for end in ("", "_low", "_high"))
        return with_interval(value, low, high, two_digits(value) if of else 2, signed=True)

    return [(heading, shown), (p, lambda row: p_cell(getattr(row, f"{of}p"), getattr(row, f"{of}p_holm")))]


def number(value: float, decimals: int, signed: bool = False) -> str:
    """Format a number with a true minus sign; NaN becomes a dash."""
    return DASH if pd.isna(value) else f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


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


def _flops(row: Any) -> str:
    """Format a run's GFLOPs; where images differ, the mean with quartiles and maximum."""
    decimals = 4 if row.flops_g < 1 else 3
    if pd.isna(row.flops_g_max):
        return number(row.flops_g, decimals)
    spread = with_interval(row.flops_g, row.flops_g_q1, row.flops_g_q3, decimals)
    return f"{spread}, at most {number(row.flops_g_max, decimals)}"


def _top1(row: Any) -> str:
    return with_interval(row.top1, row.ci_low, row.ci_high)


def _latex(text: str) -> str:
    return text.translate(str.maketrans(_ESCAPES))


FAITHFUL = ["KL, nats [95% interval]", "agreement % [95% interval]"]
# What stands below a heading, in every table that has it.
CELLS: dict[str, Callable[[Any], str]] = {
    "method": lambda row: entry_of(row.method).label,
    "knob": lambda row: knob_text(row.knob, row.value),
    "run": lambda row: row.run_id,
    "top-1 % ours": _top1,
    "top-1 % [95% interval]": _top1,
    "top-1 %": lambda row: number(row.top1, 2),
    "top-5 %": lambda row: number(row.top5, 2),
    "top-1 % published": lambda row: number(row.published_top1, 2),
    "GFLOPs published": lambda row: number(row.published_flops_g, 2),
    "GFLOPs": _flops,
    "reduction %": lambda row: number(row.flops_reduction_pct, 1),
    "KL, nats [95% interval]": lambda row: with_interval(row.kl, row.kl_low, row.kl_high, two_digits(row.kl)),
    "agreement % [95% interval]": lambda row: with_interval(row.agreement, row.agreement_low, row.agreement_high),
    "flips won / lost": lambda row: f"{number(row.flips_won, 0)} / {number(row.flips_lost, 0)}",
    "images/s": lambda row: number(row.images_per_s, 1),
    "speed-up [quartiles]": lambda row: with_interval(row.speedup, row.speedup_q1, row.speedup_q3),
    "1 image, ms": lambda row: number(row.latency_ms, 1),
}
