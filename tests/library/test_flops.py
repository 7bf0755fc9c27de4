"""Counted FLOPs against the closed form of the paper (Eq. 4) and the published GFLOPs."""

import itertools

import pytest
import timm
import torch
from networks import build

import dhtm
from baselines import ATC, PatchMerger, PiToMe, RandomMerge
from dhtm.vit import tokens_by_layer

DEIT = {"deit_tiny": (192, 1.2584), "deit_small": (384, 4.6083), "deit_base": (768, 17.5827)}  # width, published GFLOPs


def closed_form(width, in_attention, in_mlp):
    """Return Eq. 4 for each layer's numbers of patch tokens, plus embedding, norms (5 per value) and head."""
    flops = 196 * width * 3 * 16 * 16 + 5 * (in_mlp[-1] + 1) * width + width * 1000
    for n, left in zip(in_attention, in_mlp, strict=True):
        flops += 4 * (n + 1) * width**2 + 2 * (n + 1) ** 2 * width + 5 * (n + 1) * width
        flops += 8 * (left + 1) * width**2 + 5 * (left + 1) * width
    return flops


@pytest.mark.parametrize("name", DEIT)
def test_count_equals_the_published_one_and_the_closed_form(name):
    width, gflops = DEIT[name]
    with torch.device("meta"):  # initialising the weights of DeiT-Base would take seconds
        model = timm.create_model(f"{name}_patch16_224").to_empty(device="cpu")
    assert round(dhtm.count_flops(model).total / 1e9, 4) == gflops
    for k, layers in ((0, (4, 7, 11)), (56, (4, 7, 11)), (40, (4, 7, 10))):
        dhtm.patch(model, dhtm.DHTM(k=k, layers=layers))
        left = [196 - k * sum(layer >= merging for merging in layers) for layer in range(13)]
        count, expected = dhtm.count_flops(model), closed_form(width, left[:-1], left[1:])
        dhtm.unpatch(model)
        assert count.total - count.merging == expected
        assert count.total == pytest.approx(expected, rel=1e-3) and (count.merging > 0) == (k > 0)


def test_layers_add_up_to_the_total():
    count = dhtm.count_flops(dhtm.patch(timm.create_model("deit_tiny_patch16_224"), dhtm.DHTM(k=40)))
    embedding, norm, head = 196 * 192 * 768, 5 * 77 * 192, 192 * 1000
    assert len(count.by_layer) == 12 and sum(count.by_layer) + embedding + norm + head == count.total
    assert count.by_layer[0] > count.by_layer[4] > count.by_layer[7] > count.by_layer[11]


def test_count_does_not_depend_on_how_the_model_runs():
    model, counts = build("112"), []
    for options in ({}, {"backend": "reference"}, {"proportional_attention": True}):
        counts.append(dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=5, layers=(2, 3), **options))))
        dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(k=5, layers=(2, 3)))
    counts += [dhtm.count_flops(model.train()), dhtm.count_flops(model.eval().bfloat16())]
    for block in model.float().blocks:
        block.attn.fused_attn = False
    counts.append(dhtm.count_flops(model))
    assert counts == [counts[0]] * 6


def test_layernorm_and_rmsnorm_count_the_same():
    counts = []
    for norm in ("layernorm", "rmsnorm"):
        model = timm.create_model("deit_tiny_patch16_224", depth=2, norm_layer=norm, qk_norm=True)
        counts.append(dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=20, layers=(2,)))))
    assert counts[0] == counts[1]


def test_counting_does_not_change_the_model():
    model = dhtm.patch(build("112"), dhtm.DHTM(k=20, layers=(2, 3))).train()
    model(torch.randn(2, 3, 112, 112))
    before = dhtm.regions(model)
    dhtm.count_flops(model)
    assert model.training and dhtm.regions(model) is before


ALL_PAIRS = sum(n * (n - 1) // 2 + sum(left - 1 for left in range(n - 40, n)) for n in (196, 156))


@pytest.mark.parametrize(
    ("reducer", "merging"),
    [
        # All pairs in each layer, then each new token with all others.
        (dhtm.DHTM(k=40, layers=(4, 7), connectivity="all"), 192 * ALL_PAIRS),
        (RandomMerge(k=40), 0),
        (ATC(0.7, layers=(4, 7)), 64 * (196 * 195 // 2 + 137 * 136 // 2)),
        (PiToMe(0.9, layers=(1, 2)), 64 * (196**2 + 177**2)),
        # A norm and two products of all tokens with the new ones, before layers 4, 7 and 10.
        (PatchMerger(0.5), sum(5 * n * 192 + 2 * m * n * 192 for n, m in itertools.pairwise([196, 98, 49, 24]))),
    ],
)
def test_count_includes_the_computation_of_the_method(reducer, merging):
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), reducer)
    count = dhtm.count_flops(model)
    assert count.merging == merging
    left = [196, *tokens_by_layer(model)]
    in_attention = left[1:] if isinstance(reducer, PatchMerger) else left[:-1]  # the others merge after attention
    assert count.total == closed_form(192, in_attention, left[1:]) + merging


def test_model_with_a_convolutional_stem_can_be_counted():
    model = timm.create_model("vit_tiny_r_s16_p8_224")
    plain = dhtm.count_flops(model).total
    assert 0 < dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=5))).total < plain


def test_image_size_can_be_given():
    dynamic, wide = build("dynamic size"), build("224x336")
    assert dhtm.count_flops(dynamic, (224, 336)) == dhtm.count_flops(wide)
