"""The paper's claims about DHTM, and what its printed accuracies allow one to conclude."""

import math
from bisect import bisect_left

import pandas as pd
from scipy.stats import binomtest

from dhtm.report.registry import BACKBONES, entry_of
from dhtm.report.runs import read_published
from dhtm.report.statistics import LEVEL
from dhtm.report.tables import number

N_IMAGENET = 50_000


def claim(first: float, second: float, n_images: int) -> dict[str, float | str]:
    """Work out whether a published difference in top-1 can be beyond chance in the exact McNemar test.

    Two models disagree on an image if one is right and the other wrong. The more often they disagree, the more easily a net
    difference arises by chance. All shares are in percent of the images.

    Args:
        first, second: top-1 in percent.
        n_images: the number of images that they were measured on.

    Returns:
        most_disagreement_pct: the largest share on which the two may disagree for p < 0.05; NaN if none is small enough.
        independent_disagreement_pct: the share on which they disagree if they err independently of each other.
        greatest_disagreement_pct: the largest share on which two models of these accuracies can disagree.
        beyond_chance: what follows from these, in words.
    """
    right, other = (round(top1 / 100 * n_images) for top1 in (first, second))
    p, q = right / n_images, other / n_images
    net, greatest = abs(right - other), min(right + other, 2 * n_images - right - other)
    # By the number of images on which only the worse model is right; p, of the exact McNemar test, grows with it.
    possible = range((greatest - net) // 2 + 1)
    n_small = bisect_left(possible, LEVEL, key=lambda worse: binomtest(net + worse, max(1, net + 2 * worse)).pvalue)
    most = net + 2 * (n_small - 1) if n_small else math.nan
    most_pct, independent_pct = 100 * most / n_images, 100 * (p * (1 - q) + q * (1 - p))
    if not n_small:
        words = "within chance however seldom the two disagree"
    elif greatest <= most:
        words = "beyond chance however often the two disagree"
    elif independent_pct <= most_pct:
        words = "beyond chance even if the two err independently"
    else:
        words = f"beyond chance only if the two disagree on at most {most_pct:.1f}% of the images"
    return {
        "most_disagreement_pct": most_pct,
        "independent_disagreement_pct": independent_pct,
        "greatest_disagreement_pct": 100 * greatest / n_images,
        "beyond_chance": words,
    }


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
                **claim(dhtm, other, N_IMAGENET),
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
