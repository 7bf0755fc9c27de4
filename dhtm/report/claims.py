"""The paper's claims about DHTM, and what its printed accuracies allow one to conclude."""

import dataclasses
import math

import pandas as pd

from dhtm.report.registry import BACKBONES, entry_of
from dhtm.report.runs import read_published
from dhtm.report.statistics import LEVEL, mcnemar
from dhtm.report.tables import number

N_IMAGENET = 50_000


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a published difference in top-1 can mean if only the two accuracies are known.

    Two models disagree on an image if one is right and the other wrong. The more often they disagree, the more easily a net
    difference arises by chance. All shares are in percent of the images.

    Attributes:
        most_disagreement_pct: the largest share on which the two may disagree for p < 0.05; NaN if none is small enough.
        independent_disagreement_pct: the share on which they disagree if they err independently of each other.
        greatest_disagreement_pct: the largest share on which two models of these accuracies can disagree.
        beyond_chance: what follows from these, in words.
    """

    most_disagreement_pct: float
    independent_disagreement_pct: float
    greatest_disagreement_pct: float
    beyond_chance: str


def claim(first: float, second: float, n_images: int) -> Claim:
    """Work out whether a published difference can be beyond chance in the exact McNemar test.

    Args:
        first, second: top-1 in percent.
        n_images: the number of images that they were measured on.
    """
    right, other = (round(top1 / 100 * n_images) for top1 in (first, second))
    p, q = right / n_images, other / n_images
    greatest = min(right + other, 2 * n_images - right - other)
    most = _most_disagreement(abs(right - other), greatest)
    most_pct = math.nan if most is None else 100 * most / n_images
    independent_pct = 100 * (p * (1 - q) + q * (1 - p))
    if most is None:
        words = "within chance however seldom the two disagree"
    elif greatest <= most:
        words = "beyond chance however often the two disagree"
    elif independent_pct <= most_pct:
        words = "beyond chance even if the two err independently"
    else:
        words = f"beyond chance only if the two disagree on at most {most_pct:.1f}% of the images"
    return Claim(most_pct, independent_pct, 100 * greatest / n_images, words)


def _most_disagreement(net: int, greatest: int) -> int | None:
    """Return the largest number of disagreements with p < 0.05; p grows with their number."""
    if mcnemar(net, 0) >= LEVEL:
        return None
    low, high = 0, (greatest - net) // 2  # bounds of the number of images on which only the worse model is right
    while low < high:
        middle = (low + high + 1) // 2
        if mcnemar(net + middle, middle) < LEVEL:
            low = middle
        else:
            high = middle - 1
    return net + 2 * low


def paper_claims() -> pd.DataFrame:
    """Return the comparisons that the paper's text makes, with the difference in its tables and what it can mean."""
    rows = []
    for row in read_published("claims").itertuples():
        top1 = read_published(row.table).query("backbone == @row.backbone").set_index("method").top1
        dhtm, other = top1["DHTM" if row.table == "table2" else "dhtm"], top1[row.method]
        difference = round(dhtm - other, 2)
        holds = {"more than": difference > row.points, "at least": difference >= row.points}
        rows.append(
            {
                "backbone": row.backbone,
                "data": "imagenet",
                "method": row.method,
                "table": row.table,
                "published_top1": other,
                "claim": f"{row.points:.2f}" if row.relation == "exactly" else f"{row.relation} {row.points:g}",
                "published_difference": difference,
                "as_claimed": holds.get(row.relation, difference == row.points),
                **vars(claim(dhtm, other, N_IMAGENET)),
            }
        )
    return pd.DataFrame(rows)


def claim_cells(claims: pd.DataFrame) -> pd.DataFrame:
    """Format :func:`paper_claims` for readers."""
    return pd.DataFrame(
        {
            "backbone": BACKBONES[row.backbone],
            "DHTM against": entry_of(row.method).label,
            "points in the text": row.claim.replace("-", "−"),
            "points in the tables": number(row.published_difference, 2, signed=True),
            "as claimed": "yes" if row.as_claimed else "no",
            "on 50,000 images": row.beyond_chance,
        }
        for row in claims.itertuples()
    )
