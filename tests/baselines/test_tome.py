"""ToMe against a plain implementation of bipartite soft matching over the full sequence, alone and in a model."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SMALL, average, build, check_step, forward, images_for, logits, unequal_tokens

import dhtm
from baselines import ToMe
from dhtm.reducer import Attention
from dhtm.vit import tokens_by_layer


def soft_matching(keys, n_prefix, r):
    """Return for each token of one image's new sequence the old positions that are merged into it, by keys [S, d]."""
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
def test_layer_matches_the_plain_implementation(n, n_prefix, r, seed):
    tokens, regions, keys = unequal_tokens(n, seed, n_prefix)
    tome = ToMe(r, layers=(1,))
    tome.attach(5, n_prefix, (1, n + 6), (1,))
    groups = [soft_matching(image.double().mean(0).numpy(), n_prefix, r)[n_prefix:] for image in keys]
    groups = [[[position - n_prefix for position in group] for group in image] for image in groups]
    check_step(tome, tokens, regions, Attention(1, keys=keys[:, :, n_prefix:]), groups)


def test_model_matches_a_forward_pass_written_out():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **SMALL | {"depth": 12}).eval()
    for block in model.blocks:  # sharp attention, so that keys and sizes matter
        torch.nn.init.normal_(block.attn.qkv.weight, std=2 * model.embed_dim**-0.5)
        torch.nn.init.normal_(block.attn.proj.weight, std=model.embed_dim**-0.5)
    image = images_for(model, batch=1, seed=2)  # a seed with which similarities that decide a merge differ by over 1e-5
    plain, merged = logits(model, image), logits(dhtm.patch(model, ToMe(13)), image)
    dhtm.unpatch(model)

    def merge(layer, x, sizes, keys, output):
        return average(x, sizes, soft_matching(keys.mean(0).double().numpy(), 2, 13))

    torch.testing.assert_close(merged, forward(model, image, merge, proportional=True), rtol=0, atol=1e-4)
    assert (merged - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "merged"),
    [
        ({"r": 8}, [8] * 12),
        ({"r": 8, "inflect": -1}, [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        ({"r": 8, "inflect": 1}, [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
        ({"r": 6, "inflect": 0.5}, [3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9]),
        ({"r": 10, "inflect": -1, "layers": (2, 3, 5)}, [0, 20, 10, 0, 0] + [0] * 7),
        ({"r": [59, 41, 29], "layers": (4, 7, 10)}, [0, 0, 0, 59, 0, 0, 41, 0, 0, 29, 0, 0]),
        ({"r": 1000, "layers": (1, 2, 3, 4)}, [98, 49, 24, 12] + [0] * 8),  # at most half
    ],
)
def test_schedules(options, merged):
    remaining = [196 - sum(merged[:layer]) for layer in range(1, 13)]
    assert tokens_by_layer(dhtm.patch(build("deit_tiny", depth=12), ToMe(**options))) == remaining
