"""timm's NaFlexVit: on images of one size it is the classic model with the same weights, and so is a patched one."""

import copy

import pytest
import timm
import torch
from timm.models.naflexvit import checkpoint_filter_fn

import baselines
import dhtm

SMALL = {"depth": 5, "embed_dim": 48, "num_heads": 3, "num_classes": 7, "init_values": 0.1}


@pytest.fixture(scope="module")
def models():
    """The classic model and NaFlexVit with its weights."""
    torch.manual_seed(0)
    classic = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
    for parameter in classic.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    classic.pos_embed.data[:, 0] = 0  # NaFlexVit gives the CLS token no position
    options = {
        "class_token": True,
        "global_pool": "token",
        "fc_norm": False,
        "pos_embed_grid_size": (14, 14),
        "pretrained_cfg_overlay": {"input_size": (3, 224, 224)},
        "reg_tokens": 0,
    }
    naflex = timm.create_model("naflexvit_base_patch16_gap", **SMALL, **options).eval()
    naflex.load_state_dict(checkpoint_filter_fn(classic.state_dict(), naflex))
    return classic, naflex


@pytest.fixture(scope="module")
def images():
    coarse = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=224, mode="bicubic")


REDUCERS = [
    dhtm.DHTM(k=20, layers=(2, 4)),
    dhtm.DHTM(threshold=0.5, max_merges=40, layers=(2, 4)),
    dhtm.DHTMPlus(60),
    baselines.ToMe(8),
    baselines.KMedoids(0.7, layers=(2, 4)),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: repr(reducer)[:30])
@torch.inference_mode()
def test_it_is_the_classic_model(models, images, reducer):
    classic, naflex = (dhtm.patch(copy.deepcopy(model), copy.deepcopy(reducer)) for model in models)
    torch.testing.assert_close(naflex(images), classic(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(naflex).assignment, dhtm.regions(classic).assignment)
    alone = torch.cat([naflex(image[None]) for image in images])
    torch.testing.assert_close(alone, classic(images), rtol=1e-4, atol=1e-4)
    if not reducer.adaptive:
        of_classic, of_naflex = (dhtm.count_flops(model) for model in (classic, naflex))
        # A linear layer embeds the patches, whose FLOPs are those of the convolution.
        assert of_naflex.by_layer == of_classic.by_layer and of_naflex.total == of_classic.total


@torch.inference_mode()
def test_nothing_changes_without_merges_or_after_unpatching(models, images):
    naflex = copy.deepcopy(models[1])
    plain = naflex(images)
    dhtm.patch(naflex, dhtm.DHTM(k=0, layers="all"))
    assert torch.equal(naflex(images), plain)
    dhtm.unpatch(naflex)
    assert torch.equal(naflex(images), plain) and not naflex.embeds._forward_pre_hooks


@torch.no_grad()
def test_fused_half_compiled_and_exported(models, images):
    naflex = dhtm.patch(copy.deepcopy(models[1]), dhtm.DHTMPlus(60))
    expected = naflex(images)
    compiled = torch.compile(naflex, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(naflex, (images,))
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)
    for block in naflex.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(naflex(images), expected, rtol=1e-4, atol=1e-4)
    half = naflex.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_images_of_unlike_sizes_are_refused(models):
    naflex = dhtm.patch(copy.deepcopy(models[1]), dhtm.DHTM(k=3, layers=(2,)))
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    patches = {
        "patches": torch.zeros(1, 16, 768),
        "patch_coord": coordinates,
        "patch_valid": torch.ones(1, 16, dtype=bool),
    }
    with pytest.raises(ValueError, match="not patches"):
        naflex(patches)


@torch.inference_mode()
def test_models_without_a_grid_of_positions_or_without_a_pretrained_config():
    rotary = timm.create_model("naflexvit_base_patch16_gap", **SMALL, rope_type="axial", pos_embed="none").eval()
    rotary.embeds.pos_embed_grid_size = None
    assert dhtm.patch(rotary, dhtm.DHTM(k=3, layers=(2,)))(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    direct = timm.models.NaFlexVit(**SMALL, pos_embed_grid_size=(4, 4))
    dhtm.patch(direct, dhtm.DHTM(k=3, layers=(2,)))
    assert dhtm.vit.image_shape(direct) == (3, 64, 64) and dhtm.vit.tokens_by_layer(direct) == [16, 13, 13, 13, 13]
