"""Models with rotary position embeddings: a merged token is rotated by the mean of its patches' rotations."""

import copy

import pytest
import timm
import torch

import baselines
import dhtm
from dhtm.vit import image_shape, patch_grid

SMALL = {"depth": 4, "embed_dim": 96, "num_heads": 3, "num_classes": 7}
MODELS = {
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 128}),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 112}),
    "rope, axial": ("vit_small_patch16_rope_224", {"img_size": 128}),
    "rope, mixed axes for each head": ("vit_small_patch16_rope_mixed_224", {"img_size": 128}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"img_size": 128}),
    "naflex, axial": (
        "naflexvit_base_patch16_gap",
        {"rope_type": "axial", "pretrained_cfg_overlay": {"input_size": (3, 128, 128)}},
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    architecture, options = MODELS[request.param]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **(SMALL | options)).eval()
    for name, parameter in model.named_parameters():  # LayerScale starts at almost nothing
        if "gamma" in name:
            torch.nn.init.uniform_(parameter, 0.2, 1)
        elif parameter.dim() == 2 and "rope" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def images_for(model, batch=3):
    coarse = torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=image_shape(model)[1:], mode="bicubic")


def embedded(model, images):
    """Return the tokens before the first block, and the table of rotations, or one for each block."""
    if isinstance(model, timm.models.NaFlexVit):
        found = model._forward_embeds(images, None, None, None)
        return found["patches"], found["rope_embeds"]
    x, tables = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(x), tables


def logits(model, images):
    with torch.inference_mode():
        return model(images)


def rotation(table, patches, rope):
    """Average the rotations of some patches, number by number: table [heads, P, 2F] to [heads, 2F]."""
    mean = sum(table[:, patch] for patch in patches) / len(patches)
    half = mean.shape[-1] // 2
    if rope == "unit":
        for frequency in range(half):
            sine, cosine = mean[:, frequency].clone(), mean[:, half + frequency].clone()
            length = torch.sqrt(sine**2 + cosine**2).clamp(min=1e-6)  # opposite rotations cancel
            mean[:, frequency], mean[:, half + frequency] = sine / length, cosine / length
    return mean


@pytest.mark.parametrize("rope", ["unit", "mean"])
def test_the_forward_written_out_token_by_token(model, rope):
    images = images_for(model, batch=1)
    dhtm.patch(model, dhtm.DHTM(k=15, layers=(1, 3)), rope=rope)
    got = logits(model, images)
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
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_nothing_changes_without_merges_or_after_unpatching(model):
    images = images_for(model)
    plain, flops = logits(model, images), dhtm.count_flops(model).total
    dhtm.patch(model, dhtm.DHTM(k=0, layers="all"))
    assert torch.equal(logits(model, images), plain)
    dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(k=15, layers=(1, 3)))
    assert not torch.allclose(logits(model, images), plain, rtol=1e-3)
    assert 0.5 * flops < dhtm.count_flops(model).total < flops
    dhtm.unpatch(model)
    assert torch.equal(logits(model, images), plain)
    assert all(type(block) is timm.models.eva.EvaBlock for block in model.blocks)


REDUCERS = [
    dhtm.DHTM(k=15, layers=(1, 3), features="keys", proportional_attention=True),
    dhtm.DHTMPlus(30),
    baselines.ToMe(8),
    baselines.PatchMerger(0.7, layers=(2, 3)),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: type(reducer).__name__)
def test_batches_kernels_and_dtypes_agree(model, reducer):
    images = images_for(model)
    dhtm.patch(model, copy.deepcopy(reducer))
    together = logits(model, images)
    alone = torch.cat([logits(model, image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(logits(model, images), together, rtol=1e-4, atol=1e-4)
    half = logits(model.to(torch.bfloat16), images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), together, rtol=0, atol=0.5 * together.abs().max().item())


@pytest.mark.parametrize("model", ["dinov3", "rope, mixed axes for each head"], indirect=True)
@torch.no_grad()
def test_compiled_and_exported(model):
    images = images_for(model)
    dhtm.patch(model, dhtm.DHTM(k=15, layers=(1, 3), proportional_attention=True))
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(images[:2]), expected[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["dinov3", "rope, mixed axes for each head"], indirect=True)
def test_thresholds_and_full_grids(model):
    images = images_for(model)
    side = patch_grid(model)[0]
    reducer = dhtm.DHTM(k=15, layers=(1, 3))
    thresholds, tokens = dhtm.find_thresholds(model, reducer, images)
    dhtm.patch(model, dhtm.DHTM(threshold=thresholds, layers=(1, 3)))
    together = logits(model, images)
    assert len(tokens[:, -1].unique()) > 1
    torch.testing.assert_close(
        torch.cat([logits(model, image[None]) for image in images]), together, rtol=1e-4, atol=1e-5
    )
    masked = copy.deepcopy(model)
    masked.reducer.train()  # then one attention with a mask serves all images
    torch.testing.assert_close(logits(masked, images), together, rtol=1e-4, atol=1e-5)
    (grid,) = model.forward_intermediates(images, 1, intermediates_only=True)
    assert grid.shape == (3, 96, side, side)


@pytest.mark.parametrize("model", ["dinov3"], indirect=True)
def test_what_cannot_be_read_or_is_unknown_is_refused(model):
    with pytest.raises(TypeError, match="model rotates afterwards"):
        dhtm.patch(model, baselines.KMedoids(0.7, layers=(2, 3)))
    with pytest.raises(ValueError, match="rope='length': choose"):
        dhtm.patch(model, dhtm.DHTM(k=3), rope="length")
