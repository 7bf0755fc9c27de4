"""FLOPs against the closed form, and against the figures that METHODS and the paper rest on."""

import itertools

import pytest
import timm
import torch

import dhtm
from baselines import PatchMerger, RandomMerge

DEIT = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}


def closed_form(width, k, layers, classes=1000, depth=12, patches=196):
    """Eq. 4 for each layer's attention and MLP at their own token counts, plus embedding, norms (5 a value) and head."""
    flops, n = patches * width * 3 * 16 * 16, patches
    for layer in range(1, depth + 1):
        flops += 4 * (n + 1) * width**2 + 2 * (n + 1) ** 2 * width + 5 * (n + 1) * width
        n -= k if layer in layers else 0
        flops += 8 * (n + 1) * width**2 + 5 * (n + 1) * width
    return flops + 5 * (n + 1) * width + width * classes


@pytest.fixture(scope="module", params=DEIT)
def deit(request):
    return DEIT[request.param], timm.create_model(f"{request.param}_patch16_224", pretrained=False).eval()


@pytest.mark.parametrize(("k", "layers"), [*((k, (4, 7, 11)) for k in (0, 10, 56)), (40, (4, 7, 10))])
def test_count_is_the_closed_form(deit, k, layers):
    width, model = deit
    dhtm.patch(model, dhtm.DHTM(k=k, layers=layers))
    count = dhtm.count_flops(model)
    dhtm.unpatch(model)
    expected = closed_form(width, k, layers)
    assert count.total - count.merging == expected
    assert count.total == pytest.approx(expected, rel=1e-3)
    assert (count.merging > 0) == (k > 0)


def test_unmerged_deit(deit):
    width, model = deit
    expected = {192: 1.2584, 384: 4.6083, 768: 17.5827}[width]
    assert round(dhtm.count_flops(model).total / 1e9, 4) == expected


def test_layers_add_up():
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), dhtm.DHTM(k=40))
    count = dhtm.count_flops(model)
    assert len(count.by_layer) == 12
    embedding, norm, head = 196 * 192 * 768, 5 * 77 * 192, 192 * 1000
    assert sum(count.by_layer) + embedding + norm + head == count.total
    assert count.by_layer[0] > count.by_layer[4] > count.by_layer[7] > count.by_layer[11]


@pytest.mark.parametrize("change", ["backend", "unfused", "bfloat16", "train", "proportional"])
def test_count_does_not_depend_on_how_the_model_runs(change):
    options = {"backend": {"backend": "reference"}, "proportional": {"proportional_attention": True}}.get(change, {})
    model = timm.create_model("deit_tiny_patch16_224", depth=4)
    expected = dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=20, layers=(2, 3))))
    dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(k=20, layers=(2, 3), **options))
    if change == "unfused":
        for block in model.blocks:
            block.attn.fused_attn = False
    model = model.to(torch.bfloat16) if change == "bfloat16" else model
    assert dhtm.count_flops(model.train(change == "train")) == expected


def test_counting_leaves_the_model_as_it_was():
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224", depth=4), dhtm.DHTM(k=20, layers=(2, 3))).train()
    model(torch.randn(2, 3, 224, 224))
    before = dhtm.regions(model)
    dhtm.count_flops(model)
    assert model.training and dhtm.regions(model) is before


def test_all_pairs_cost_their_similarities():
    """In each layer all pairs first, and after each merge the new token with all others."""
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), dhtm.DHTM(k=40, layers=(4, 7), connectivity="all"))
    pairs = sum(n * (n - 1) // 2 + sum(left - 1 for left in range(n - 40, n)) for n in (196, 156))
    assert dhtm.count_flops(model).merging == 192 * pairs


def test_random_merging_costs_what_dhtm_costs_without_its_similarities():
    model = timm.create_model("deit_tiny_patch16_224")
    ours = dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=40)))
    dhtm.unpatch(model)
    random = dhtm.count_flops(dhtm.patch(model, RandomMerge(k=40)))
    assert random.merging == 0 and random.total == ours.total - ours.merging


def test_what_learned_methods_compute_is_counted():
    """PatchMerger in deit_tiny: a norm and two products of all tokens with the new ones, before layers 4, 7 and 10."""
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224"), PatchMerger(0.5))
    count = dhtm.count_flops(model)
    stages, width = [196, 98, 49, 24], 192
    assert count.merging == sum(5 * n * width + 2 * m * n * width for n, m in itertools.pairwise(stages))
    blocks = sum(3 * (12 * (n + 1) * width**2 + 2 * (n + 1) ** 2 * width + 10 * (n + 1) * width) for n in stages)
    assert count.total == 196 * 768 * width + blocks + count.merging + 5 * 25 * width + 1000 * width


def test_images_cost_the_same_in_half_precision():
    """A run counts the FLOPs of its images on the model that predicted, in the run's precision."""
    tokens = torch.tensor([[196, 150, 100, 100], [196, 196, 180, 180]])
    model = dhtm.patch(timm.create_model("deit_tiny_patch16_224", depth=4), dhtm.DHTM(threshold=0.9, layers=(2, 3)))
    expected = dhtm.count_flops_of_images(model, tokens)
    found = dhtm.count_flops_of_images(model.bfloat16(), tokens)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_model_with_a_convolutional_stem_is_counted():
    model = timm.create_model("vit_tiny_r_s16_p8_224")
    plain = dhtm.count_flops(model).total
    assert 0 < dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=5))).total < plain


def test_image_size():
    model = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True)
    assert dhtm.count_flops(model, (224, 336)).total > dhtm.count_flops(model).total
    wide = timm.create_model("deit_tiny_patch16_224", img_size=(224, 336))
    assert dhtm.count_flops(model, (224, 336)).total == dhtm.count_flops(wide).total
