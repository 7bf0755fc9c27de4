"""Equal cost: the knob of a method (k, r or keep rate) with which a backbone comes nearest to a target of FLOPs."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf
from timm.models.vision_transformer import VisionTransformer

from dhtm.flops import FlopCount, count_flops
from dhtm.harness.core.errors import UnavailableError, UserError
from dhtm.harness.models.backbones import bare_backbone
from dhtm.harness.models.methods import build_reducer, patched
from dhtm.vit import patch, tokens_by_layer, unpatch

_STEPS = 200  # keep rates are tried in steps of 0.005, about one token of 196


def solve(backbone: DictConfig, method: DictConfig, target: DictConfig) -> tuple[DictConfig, float | None]:
    """Set a method's knob so that its counted FLOPs come nearest to a target.

    Args:
        backbone, method: of the config groups of these names; ``method.knob`` says which option is the knob, an integer to
            be counted up from 0 or a rate to be lowered from 1.
        target: ``reduction_pct`` of the backbone's FLOPs, or ``flops_g``, or neither.

    Returns:
        The method as it is to be run, and the target as a reduction in percent; None where there is no target, or the
        method has no knob.

    Raises:
        UnavailableError: the target is out of reach; the message gives the range.
        UserError: the target is not a target.
    """
    if not isinstance(target, DictConfig):
        raise UserError(f"target={target}: set target.reduction_pct or target.flops_g")
    if target.reduction_pct is not None and target.flops_g is not None:
        raise UserError("target: give target.reduction_pct or target.flops_g, not both")
    if (target.reduction_pct is None and target.flops_g is None) or method.knob is None:
        return method, None
    model = patched(bare_backbone(backbone.architecture, backbone.num_classes), backbone, method)  # or says why not
    plain = baseline_flops(backbone.architecture, backbone.num_classes)
    wanted, said = _wanted(target, plain)
    rows, columns = model.patch_embed.grid_size
    rate = method.knob == "keep_rate" or isinstance(method[method.knob], float)
    given = OmegaConf.to_container(method, resolve=True)

    def value(i: int) -> float | int:
        return (_STEPS - i) / _STEPS if rate else i

    def setting(i: int) -> tuple[str, int, str]:
        return _setting(backbone, {**given, method.knob: value(i)})

    def cost(i: int) -> int:
        return _flops(*setting(i)).total

    def tokens(i: int) -> tuple[int, ...] | None:
        return _tokens(*setting(i))

    def roughly(i: int) -> float:
        return _rough_share(tokens(i), rows * columns, model.embed_dim)

    last = _last(lambda i: tokens(i) is not None, _STEPS if rate else rows * columns)
    guess = _last(lambda i: roughly(i) >= wanted / plain, last)
    left_out = cost(guess) / plain - roughly(guess)  # by Eq. 4
    guess = _last(lambda i: roughly(i) + left_out >= wanted / plain, last)
    found = _nearest(cost, guess, last, wanted)
    if found is None:
        # A method may stop merging before it stops working.
        end = _last(lambda i: i == 0 or tokens(i - 1) != tokens(last), last)
        first, least = (100 * (1 - cost(i) / plain) for i in (0, end))
        raise UnavailableError(
            f"{said}: method={method.name} in layers {method.layers} of {backbone.name} reaches from {first:.1f}% "
            f"({method.knob}={value(0)}) to {least:.1f}% ({method.knob}={value(end)})"
        )
    solved = method.copy()
    solved[method.knob] = value(found)
    return solved, target.reduction_pct if target.flops_g is None else round(100 * (1 - wanted / plain), 6)


def _wanted(target: DictConfig, plain: int) -> tuple[float, str]:
    key = "reduction_pct" if target.reduction_pct is not None else "flops_g"
    value, said = target[key], f"target.{key}={target[key]}"
    if not isinstance(value, (int, float)) or value < 0 or (key == "reduction_pct" and value >= 100):
        raise UserError(f"{said}: give " + ("percents from 0 to 100" if key == "reduction_pct" else "GFLOPs from 0"))
    return (plain * (1 - value / 100) if key == "reduction_pct" else value * 1e9), said


def _last(possible: Callable[[int], bool], end: int) -> int:
    """The last of 0, 1, …, end that is possible; those after it are not."""
    low, high = 0, end + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return low


def _nearest(cost: Callable[[int], int], guess: int, last: int, wanted: float) -> int | None:
    """Where a falling cost comes nearest to what is wanted, from 0 to last; None if all of it is above or below.

    Every count takes time: from a good guess on, two or three will do.
    """
    low = high = guess
    step = 1
    while cost(low) < wanted:
        if low == 0:
            return None
        low, high, step = max(0, low - step), low, 2 * step
    while cost(high) > wanted:
        if high == last:
            return None
        low, high, step = high, min(last, high + step), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) >= wanted else (low, middle)
    return min((low, high), key=lambda i: abs(cost(i) - wanted))


def _rough_share(tokens: tuple[int, ...], n_patches: int, channels: int) -> float:
    """FLOPs by Eq. 4, 12ND² + 2N²D a layer, over those of the backbone; for a first guess."""

    def layer(n: int) -> int:
        return 12 * n * channels**2 + 2 * n**2 * channels

    return sum(map(layer, tokens)) / (len(tokens) * layer(n_patches))


def flops(backbone: DictConfig, method: DictConfig) -> FlopCount:
    """FLOPs of a backbone with a method as it is configured; weights and images change none."""
    return _flops(*_setting(backbone, OmegaConf.to_container(method, resolve=True)))


@functools.cache
def baseline_flops(architecture: str, num_classes: int) -> int:
    """FLOPs of a backbone that is not patched."""
    return count_flops(bare_backbone(architecture, num_classes)).total


def _setting(backbone: DictConfig, method: dict) -> tuple[str, int, str]:
    return backbone.architecture, backbone.num_classes, json.dumps(method, sort_keys=True)


@contextlib.contextmanager
def _reducing(architecture: str, num_classes: int, method: str) -> Iterator[VisionTransformer]:
    """The bare architecture, for weights change no FLOPs, with a method in it for a while."""
    model = bare_backbone(architecture, num_classes)
    patch(model, build_reducer(OmegaConf.create(json.loads(method))))
    try:
        yield model
    finally:
        unpatch(model)


# A sweep over targets asks for the same counts again and again.
@functools.lru_cache(maxsize=4096)
def _flops(*setting) -> FlopCount:
    with _reducing(*setting) as model:
        return count_flops(model)


@functools.lru_cache(maxsize=4096)
def _tokens(*setting) -> tuple[int, ...] | None:
    """Tokens that leave each layer; None where the setting is impossible."""
    try:
        with _reducing(*setting) as model:
            return tuple(tokens_by_layer(model))
    except (ValueError, TypeError, UserError):
        return None
