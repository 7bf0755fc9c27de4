"""Models with rotary position embeddings: a merged token is rotated by the mean of its patches' rotations."""

import pytest
import timm
import torch
from networks import ROTARY, build, images_for, logits

import baselines
import dhtm
from dhtm.vit import patch_grid


def embedded(model, images):
    """Return the tokens before the first block, and the table of rotations or, with mixed axes, one table per block."""
    if isinstance(model, timm.models.NaFlexVit):
        embeddings = model._forward_embeds(images, None, None, None)
        return embeddings["patches"], embeddings["rope_embeds"]
    x, tables = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(x), tables


def rotation(table, patches, rope):
    """Average the rotations of some patches, number by number: table [heads, P, 2F] to [heads, 2F]."""
    mean = table[:, patches].mean(dim=1)
    if rope == "unit":  # each pair of a sine and a cosine gets length 1; opposite rotations cancel
        mean = torch.nn.functional.normalize(mean.unflatten(1, (2, -1)), dim=1, eps=1e-6).flatten(1)
    return mean


@pytest.mark.parametrize(
    ("name", "rope"), [*((name, "unit") for name in ROTARY), ("rope, mixed axes for each head", "mean")]
)
def test_merged_tokens_are_rotated_by_the_mean_over_their_patches(name, rope):
    model = build(name)
    images = images_for(model, batch=1)
    got = logits(dhtm.patch(model, dhtm.DHTM(k=15, layers=(1, 3)), rope=rope), images)
    (full_grid,) = model.forward_intermediates(images, 1, intermediates_only=True)
    assert full_grid.shape == (1, 48, *patch_grid(model))
    dhtm.unpatch(model)
    prefix = model.num_prefix_tokens
    with torch.inference_mode():
        (x, tables), regions = embedded(model, images), None
        for layer, block in enumerate(model.blocks, start=1):
            table = tables[layer - 1] if getattr(model, "rope_mixed", False) else tables[None]
            if regions is not None:
                assignment = regions.assignment[0]
                members = [(assignment == token).nonzero()[:, 0].tolist() for token in range(regions.n_tokens)]
                table = torch.stack([rotation(table, patches, rope) for patches in members], dim=1)
            x = x + (1 if block.gamma_1 is None else block.gamma_1) * block.attn(block.norm1(x), rope=table[None])
            if layer in (1, 3):
                grid = None if regions else patch_grid(model)
                tokens, regions = dhtm.hierarchical_merge(x[:, prefix:], 15, regions, grid, backend="reference")
                x = torch.cat([x[:, :prefix], tokens], dim=1)
            x = x + (1 if block.gamma_2 is None else block.gamma_2) * block.mlp(block.norm2(x))
        expected = model.forward_head(model.norm(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_reading_rotated_attention_or_unknown_rope_raises():
    model = build("dinov3")
    with pytest.raises(TypeError, match="model rotates afterwards"):
        dhtm.patch(model, baselines.KMedoids(0.7, layers=(2, 3)))
    with pytest.raises(ValueError, match="rope='length': choose"):
        dhtm.patch(model, dhtm.DHTM(k=3), rope="length")
