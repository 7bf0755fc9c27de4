"""PiToMe (Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging")."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dhtm.reducer import Attention, Reducer, highest, merge_into, products, rows, unit
from dhtm.regions import Regions


class PiToMe(Reducer):
    """Merge tokens that have many like them, and protect those that are distinctive.

    A token's energy is the mean of g(cos − m) over all tokens of the image, where g(z) = z for z > 0 and α(e^z − 1)
    below. It is high inside a large group of similar tokens. Cosines are those of the attention keys, averaged over heads,
    and the margin m falls over the layers. Two ways to match are in use:

    - ranked bipartite: the tokens in the order of their energy, highest first, are by turns in set A and set B. Each A
      token proposes its most similar B token, and the r best proposals are merged.
    - energy-protected: only the 2r tokens of highest energy are by turns in A and B, and every A token merges into its
      most similar B token.

    A merged token takes the place of its B token, and averages are weighted by patches. Ties go to the lower index.

    Args:
        ratio: tokens to keep in each layer, r = ⌊N − N·ratio⌋ of N are merged; from 0.5 to 1.
        layers: the layers that merge, from 1, increasing; or "all". Where they are a part of the model's, the layers and
            their number in the margin and the schedule are counted within that part.
        margin: m in the first of the layers; m·(1 − (l − 1)/L) in the l-th of L.
        alpha: α of the energy.
        schedule: "deit" (ranked bipartite in the first ⌈L/2⌉ layers, energy-protected after them) or "mae" (the reverse).
        proportional_attention: add the log of token sizes to the attention logits of later layers; the paper does not.

    Raises:
        ValueError: the ratio is outside [0.5, 1], an option is unknown, or layers are not increasing.
    """

    needs = frozenset({"keys"})

    def __init__(
        self,
        ratio: float = 0.95,
        layers: Sequence[int] | str = "all",
        margin: float = 0.75,
        alpha: float = 1.0,
        schedule: str = "deit",
        proportional_attention: bool = False,
    ):
        super().__init__(layers)
        if not isinstance(ratio, (int, float)) or not 0.5 <= ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: it must be from 0.5 to 1")
        if schedule not in ("deit", "mae"):
            raise ValueError(f"schedule={schedule!r}: choose one of 'deit', 'mae'")
        self.ratio, self.margin, self.alpha, self.matching = ratio, margin, alpha, schedule
        self.proportional_attention = proportional_attention

    def tokens_after(self, n_tokens: int, layer: int, grid: tuple[int, int]) -> int:
        return n_tokens - math.floor(n_tokens - n_tokens * self.ratio)

    def forward(self, tokens: Tensor, regions: Regions, attention: Attention) -> tuple[Tensor, Regions]:
        n = tokens.shape[1]
        r = n - self.tokens_after(n, attention.layer, regions.grid)
        if r == 0:
            return tokens, regions
        place, depth = self.schedule.index(attention.layer), len(self.schedule)
        with torch.no_grad():  # which tokens merge has no gradient
            units = unit(attention.keys.float().mean(dim=1))
            similarity = products(units, units)
            energy = F.elu(similarity - self.margin * (1 - place / depth), self.alpha).mean(dim=2)
            order = highest(energy, n)
            ranked = (place < math.ceil(depth / 2)) == (self.matching == "deit")
            order = order if ranked else order[:, : 2 * r]
            a, b = order[:, 0::2], order[:, 1::2]
            of_a = rows(similarity, a)
            best, partner = of_a.gather(2, b[:, None].expand(-1, a.shape[1], -1)).max(dim=2)
            if ranked:
                proposals = highest(best, r)
                a, partner = a.gather(1, proposals), partner.gather(1, proposals)
        return merge_into(tokens, regions, a, b.gather(1, partner))

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, layers={self.layers}, margin={self.margin}, schedule={self.matching!r}"
