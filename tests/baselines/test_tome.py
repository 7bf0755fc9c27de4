"""ToMe against a literal statement of bipartite soft matching over the full sequence, alone and in whole models."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vit import SMALL, build, images_for, logits
from written_out import check_step, forward, sharpen, unequal_regions

import dhtm
from baselines import ToMe
from dhtm import Regions
from dhtm.reducer import Attention
from dhtm.vit import tokens_by_layer


def soft_matching(keys, n_prefix, r):
    """The new sequence of one image as lists of the old positions that each token is made of, from keys [S, d]."""
    r = min(r, (len(keys) - n_prefix) // 2)
    if r == 0:
        return [[i] for i in range(len(keys))]
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    similarity = (keys @ keys.T).tolist()
    a = [i for i in range(len(keys)) if i >= n_prefix and i % 2 == 0]
    b = [i for i in range(len(keys)) if i >= n_prefix and i % 2 == 1]
    proposals = []
    for i in a:
        partner = max(b, key=lambda j: similarity[i][j])
        proposals.append((similarity[i][partner], i, partner))
    into = {i: partner for _, i, partner in sorted(proposals, reverse=True)[:r]}
    received = [[j] + [i for i in into if into[i] == j] for j in b]
    return [[i] for i in range(n_prefix)] + [[i] for i in a if i not in into] + received


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 15), n_prefix=st.sampled_from([0, 1, 2, 5]), r=st.integers(0, 9), seed=st.integers(0, 2**32 - 1)
)
def test_one_step(n, n_prefix, r, seed):
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, n_prefix + n, 4, generator=rng)
    tokens = torch.randn(2, n, 5, generator=rng, dtype=torch.float64)
    regions = Regions(*unequal_regions(n, seed), (1, n + 6))
    tome = ToMe(r, layers=(1,))
    tome.attach(5, n_prefix, (1, n + 6), (1,))
    groups = [soft_matching(image.double().mean(0).numpy(), n_prefix, r)[n_prefix:] for image in keys]
    groups = [[[position - n_prefix for position in group] for group in image] for image in groups]
    check_step(tome, tokens, regions, Attention(1, keys=keys[:, :, n_prefix:]), groups)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options", "r"),
    [
        ("deit_tiny_patch16_224", SMALL | {"depth": 12}, 8),
        ("deit_tiny_distilled_patch16_224", SMALL | {"depth": 12}, 13),
        ("deit_small_patch16_224", {}, 13),
    ],
)
def test_the_whole_model_gives_the_logits_of_the_written_out_one(architecture, options, r, proportional):
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **options).eval()
    sharpen(model)
    image = images_for(model, batch=1, seed=2)  # no two similarities that matter are within 1e-5 of each other
    plain = logits(model, image)
    dhtm.patch(model, ToMe(r, proportional_attention=proportional))
    merged = logits(model, image)
    dhtm.unpatch(model)
    with torch.inference_mode():
        expected = forward(
            model, image, lambda layer, keys: soft_matching(keys, model.num_prefix_tokens, r), proportional
        )
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert (merged - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("r", "inflect", "expected"),
    [
        (8, 0, [8] * 12),
        (8, -1, [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        (8, 1, [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
        (6, 0.5, [3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9]),
    ],
)
def test_r_falls_or_rises_linearly(r, inflect, expected):
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False, **SMALL | {"depth": 12})
    left = [196 - sum(expected[:layer]) for layer in range(1, 13)]
    assert tokens_by_layer(dhtm.patch(model, ToMe(r, inflect=inflect))) == left


def test_the_schedule_runs_over_the_layers_that_reduce():
    model = dhtm.patch(build("deit_tiny"), ToMe(10, layers=(2, 3, 5), inflect=-1))
    logits(model, images_for(model))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [196, 176, 166, 166, 166]


def test_r_may_be_given_by_layer():
    """Haurum et al. (2023) at a keep rate of 0.7."""
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False, **SMALL | {"depth": 12})
    dhtm.patch(model, ToMe([59, 41, 29], layers=(4, 7, 10)))
    assert tokens_by_layer(model) == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3
    logits(model, images_for(model))
    assert dhtm.regions(model).n_tokens == 67
    dhtm.unpatch(model)
    with pytest.raises(ValueError, match=r"r=\[59, 41\]: give one number for each of the 3 layers"):
        dhtm.patch(model, ToMe([59, 41], layers=(4, 7, 10)))


def test_r_of_nothing_changes_nothing():
    model = build("deit_tiny")
    images = images_for(model)
    plain = logits(model, images)
    assert torch.equal(logits(dhtm.patch(model, ToMe(0)), images), plain)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled"])
def test_a_layer_merges_at_most_half_of_the_patch_tokens(name):
    model = dhtm.patch(build(name), ToMe(1000))
    assert logits(model, images_for(model)).isfinite().all()
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [98, 49, 25, 13, 7]
    assert tokens_by_layer(model) == [98, 49, 25, 13, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": [8, -1]}, r"r=\[8, -1\]"),
        ({"r": 8, "inflect": 1.5}, "inflect=1.5"),
        ({"r": [8, 8], "inflect": 0.5}, "inflect=0.5: it must be 0 where r is a list"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ToMe(**options)
