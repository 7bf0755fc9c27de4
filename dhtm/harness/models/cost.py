"""Equal cost: the setting of a method's knob (k, r or keep rate) whose FLOPs come nearest to a target."""

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dhtm.flops import CostOfTokens, FlopCount, count_flops, count_flops_of_images
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method
from dhtm.thresholds import find_thresholds
from dhtm.vit import patch_grid, tokens_by_layer, unpatch

_RATES = ("keep_rate", "ratio")  # knobs that are rates even if given as the integer 1
_STEPS = 200  # rates are tried in steps of 0.005, about one token of 196


@dataclass(frozen=True)
class Target:
    """The cost that a method's knob is solved for; both None: the knob stays as it is.

    Attributes:
        reduction_pct: FLOPs saved, in percent of the backbone's.
        flops_g: GFLOPs of the whole model.
    """

    reduction_pct: Annotated[float, Field(ge=0, lt=100)] | None = None
    flops_g: Annotated[float, Field(ge=0)] | None = None

    def __post_init__(self):
        if self.reduction_pct is not None and self.flops_g is not None:
            raise UserError("target: give target.reduction_pct or target.flops_g, not both")

    def __str__(self):
        if self.flops_g is not None:
            return f"target.flops_g={self.flops_g:g}"
        return f"target.reduction_pct={self.reduction_pct:g}"


def solve(backbone: Backbone, method: Method, target: Target) -> tuple[Method, float | None]:
    """Set a method's knob so that its counted FLOPs come nearest to a target.

    A knob that is an integer is counted up from 0; a rate is lowered from 1.

    Returns:
        The method with its knob set, and the target as a reduction in percent; None if there is no target, or the
        method has no knob.

    Raises:
        UnavailableError: the target is out of reach; the message gives the range.
        UserError: the knob is a threshold, see :func:`solve_thresholds`.
    """
    if target == Target() or method.knob is None:
        return method, None
    if method.knob == "threshold":
        raise UserError(
            f"{target}: the FLOPs of method={method.name} depend on the images, so no target can be set here; set "
            "target.reduction_pct=null"
        )
    is_rate = method.knob in _RATES or isinstance(method.setting, float)

    def at(i: int) -> Method:
        value = (_STEPS - i) / _STEPS if is_rate else i
        return dataclasses.replace(method, options={**method.options, method.knob: value})

    def cost(i: int) -> int:
        return flops(backbone, at(i)).total

    def tokens(i: int) -> tuple[int, ...] | None:
        return _tokens(backbone, at(i))

    def without_own(i: int) -> int:
        return int(_cost_of_tokens(backbone)(torch.tensor([tokens(i)])))

    def first_below(limit: float, end: int) -> int:
        return bisect.bisect_left(range(end + 1), -limit, key=lambda i: -without_own(i))

    with _patch_briefly(backbone, at(0)) as unmerged:  # raises an error if the method does not fit the backbone
        n_patches = math.prod(patch_grid(unmerged))
    plain = baseline_flops(backbone)
    wanted = plain * (1 - target.reduction_pct / 100) if target.flops_g is None else target.flops_g * 1e9
    # Settings 0, 1, …, last are possible. Each costs less than the one before, until the method can merge no more.
    steps = range((_STEPS if is_rate else n_patches) + 1)
    last = bisect.bisect_left(steps, True, key=lambda i: tokens(i) is None) - 1
    end = bisect.bisect_left(range(last), True, key=lambda i: tokens(i) == tokens(last))
    # Counting a cost takes a trace. So first guess where it falls below the wanted one, from the numbers of tokens: without the
    # method's own FLOPs, then with its own FLOPs at the first guess.
    guess = min(first_below(wanted, end), end)
    below = first_below(wanted - (cost(guess) - without_own(guess)), end)
    while below > 0 and cost(below - 1) <= wanted:
        below -= 1
    while below <= end and cost(below) > wanted:
        below += 1
    if below > end or (below == 0 and cost(0) < wanted):
        first, least = (f"{100 * (1 - cost(i) / plain):.1f}% ({method.knob}={at(i).setting})" for i in (0, end))
        raise UnavailableError(
            f"{target}: method={method.name} in layers {method.options['layers']} of {backbone.name} reaches from "
            f"{first} to {least}"
        )
    found = min((max(below - 1, 0), below), key=lambda i: abs(cost(i) - wanted))
    return at(found), target.reduction_pct if target.flops_g is None else round(100 * (1 - wanted / plain), 6)


def with_number(method: Method) -> Method:
    """Return the method with the same number of merges in every image, shared among layers according to ``inflect``."""
    options = {**method.options, "threshold": None, "max_merges": None, "total": 0}
    return dataclasses.replace(method, knob="total", options=options)


def solve_thresholds(
    backbone: Backbone, model: VisionTransformer, method: Method, target: Target, images: Tensor
) -> tuple[Method, float | None]:
    """Set the thresholds of a method so that its mean FLOPs on images come nearest to a target.

    Args:
        model: the backbone with its weights, on the images' device.
        images: [B, C, H, W], not from the test split; labels are not needed.

    Returns:
        As :func:`solve`.
    """
    in_all, target_pct = solve(backbone, with_number(method), target)
    share = 1.0
    # FLOPs are not proportional to tokens: an image of few tokens costs less, so equal merges do not mean equal FLOPs.
    for _ in range(3):
        thresholds, tokens = find_thresholds(model, in_all.reducer(), images, share)
        found = dataclasses.replace(method, options={**method.options, "threshold": thresholds})
        total, _ = count_flops_of_images(found.put_into(backbone.bare(), backbone.name), tokens.cpu())
        reached = 100 * (1 - total.double().mean().item() / baseline_flops(backbone))
        share *= target_pct / reached if reached > 0 else 1
    return found, target_pct


@functools.cache
def _cost_of_tokens(backbone: Backbone) -> CostOfTokens:
    return CostOfTokens.of(backbone.bare())


def baseline_flops(backbone: Backbone) -> int:
    """Count the FLOPs of the unpatched backbone."""
    return _cost_of_tokens(backbone).unmerged


@functools.lru_cache(maxsize=4096)  # a sweep over targets asks for the same counts again and again
def flops(backbone: Backbone, method: Method) -> FlopCount:
    """Count the FLOPs of a backbone with a method; they do not depend on weights or images."""
    with _patch_briefly(backbone, method) as model:
        return count_flops(model)


@functools.lru_cache(maxsize=4096)
def _tokens(backbone: Backbone, method: Method) -> tuple[int, ...] | None:
    """Return the number of tokens after each layer; None if the setting is impossible."""
    try:
        with _patch_briefly(backbone, method) as model:
            return tuple(tokens_by_layer(model))
    except UserError:
        return None


@contextlib.contextmanager
def _patch_briefly(backbone: Backbone, method: Method) -> Iterator[VisionTransformer]:
    """Yield the bare backbone patched with a method, and unpatch it afterwards; a UserError if it cannot be patched."""
    model = method.patch(backbone.bare(), backbone.name)
    try:
        yield model
    finally:
        unpatch(model)
