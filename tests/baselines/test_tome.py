"""ToMe against a literal statement of bipartite soft matching over the full sequence, alone and in whole models."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vit import SMALL, build, images_for, logits

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


def average(x, sizes, groups):
    """The tokens and sizes after x [S, D] of these sizes were merged."""
    shares = torch.zeros(len(groups), len(x), dtype=x.dtype)
    for new, group in enumerate(groups):
        for old in group:
            shares[new, old] = sizes[old]
    sizes = shares.sum(1)
    return shares @ x / sizes[:, None], sizes


def forward(model, image, n_prefix, r_by_layer, proportional):
    """The logits of one image, ToMe and unfused attention written into timm's own modules."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]
    sizes = torch.ones(len(x))
    for block, r in zip(model.blocks, r_by_layer, strict=True):
        qkv = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, block.attn.num_heads, -1)
        queries, keys, values = qkv.permute(1, 2, 0, 3)
        scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
        scores = scores + sizes.log() if proportional else scores
        x = x + block.attn.proj((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
        x, sizes = average(x, sizes, soft_matching(keys.mean(0).double().numpy(), n_prefix, r))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x[None]))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 15), n_prefix=st.sampled_from([0, 1, 2, 5]), r=st.integers(0, 9), seed=st.integers(0, 2**32 - 1)
)
def test_one_step(n, n_prefix, r, seed):
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, n_prefix + n, 4, generator=rng)
    tokens = torch.randn(2, n, 5, generator=rng, dtype=torch.float64)
    assignment = torch.cat([torch.arange(n), torch.randint(n, (6,), generator=rng)])  # tokens of one and more patches
    assignment = torch.stack([assignment, assignment.flip(0)])
    sizes = torch.stack([torch.bincount(patches, minlength=n) for patches in assignment])
    tome = ToMe(r, layers=(1,))
    tome.attach(5, n_prefix, (1, n + 6), (1,))
    attention = Attention(1, keys=keys[:, :, n_prefix:])
    new_tokens, new_regions = tome(tokens, Regions(assignment, sizes, (1, n + 6)), attention)
    for image in range(2):
        groups = soft_matching(keys[image].double().mean(0).numpy(), n_prefix, r)[n_prefix:]
        groups = [[position - n_prefix for position in group] for group in groups]
        expected, expected_sizes = average(tokens[image], sizes[image], groups)
        torch.testing.assert_close(new_tokens[image], expected)
        assert new_regions.sizes[image].tolist() == expected_sizes.tolist()
        place = {token: new for new, group in enumerate(groups) for token in group}
        assert new_regions.assignment[image].tolist() == [place[token] for token in assignment[image].tolist()]


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
    for block in model.blocks:  # sharp attention, so that its keys and sizes matter
        torch.nn.init.normal_(block.attn.qkv.weight, std=2 * model.embed_dim**-0.5)
        torch.nn.init.normal_(block.attn.proj.weight, std=model.embed_dim**-0.5)
    image = images_for(model, batch=1, seed=2)  # no two similarities that matter are within 1e-5 of each other
    plain = logits(model, image)
    dhtm.patch(model, ToMe(r, proportional_attention=proportional))
    merged = logits(model, image)
    dhtm.unpatch(model)
    with torch.inference_mode():
        expected = forward(model, image, model.num_prefix_tokens, [r] * 12, proportional)
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
    [({"r": -1}, "r=-1"), ({"r": 2.5}, "r=2.5"), ({"r": 8, "inflect": 1.5}, "inflect=1.5")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ToMe(**options)
