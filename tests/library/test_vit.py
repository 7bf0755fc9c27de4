"""dhtm.patch on the models it promises to work for."""

import copy

import pytest
import timm
import torch

import dhtm
from baselines import RandomMerge
from dhtm.vit import image_ids, tokens_by_layer

# Real architectures, cut to a few blocks and heads so that the matrix runs in seconds: what matters is their parts.
SMALL = {"depth": 5, "embed_dim": 48, "num_heads": 3}
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "deit_small": ("deit_small_patch16_224", {}),
    "deit_base": ("deit_base_patch16_224", {}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit_small_distilled": ("deit_small_distilled_patch16_224", {}),
    "deit_base_distilled": ("deit_base_distilled_patch16_224", {}),
    "deit3 (LayerScale)": ("deit3_small_patch16_224", {}),
    "augreg": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 112, "num_classes": 10}),
    "siglip (attention pooling)": ("vit_base_patch16_siglip_224", {"num_classes": 10}),
    "224x336": ("deit_tiny_patch16_224", {"img_size": (224, 336)}),
    "384": ("deit_tiny_patch16_224", {"img_size": 384}),
    "dynamic size": ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
    "q/k norm, average pooling": ("vit_medium_patch16_gap_256", {"qk_norm": True}),
}


def build(name, **more):
    architecture, options = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **(SMALL | options | more)).eval()
    for parameter in model.parameters():  # LayerScale and biases start at almost nothing, which would hide a lost one
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.2, 1)
    return model


def images_for(model, batch=2, seed=1):
    size = model.patch_embed.img_size
    coarse = torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")


def logits(model, images):
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize("name", MODELS)
def test_patching(name):
    model = build(name)
    images = images_for(model)
    plain, state = logits(model, images), {key: value.clone() for key, value in model.state_dict().items()}

    assert dhtm.patch(model, dhtm.DHTM(k=0, layers="all")) is model
    assert torch.equal(logits(model, images), plain)
    dhtm.unpatch(model)

    dhtm.patch(model, dhtm.DHTM(k=7, layers=(2, 4)))
    merged = logits(model, images)
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    grid = model.patch_embed.grid_size
    regions = dhtm.regions(model)
    assert regions.grid == tuple(grid) and regions.n_tokens == grid[0] * grid[1] - 14
    assert (regions.sizes.sum(1) == grid[0] * grid[1]).all()
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == tokens_by_layer(model)
    assert set(model.state_dict()) == set(state)

    dhtm.unpatch(model)
    assert torch.equal(logits(model, images), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "reduction") and not any(hook for hook in model.patch_embed._forward_pre_hooks)
    assert all(type(block) is timm.models.vision_transformer.Block for block in model.blocks)


@pytest.mark.parametrize("name", ["deit_tiny", "deit3 (LayerScale)", "siglip (attention pooling)"])
def test_a_patched_model_is_the_plain_one_with_tokens_merged_between_its_branches(name):
    """The whole forward written out with timm's own modules, for one image, Algorithm 1 in between."""
    model = build(name)
    images = images_for(model, batch=1)
    dhtm.patch(model, dhtm.DHTM(k=30, layers=(2, 4)))
    got = logits(model, images)
    dhtm.unpatch(model)
    with torch.inference_mode():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        regions, prefix = None, model.num_prefix_tokens
        for layer, block in enumerate(model.blocks, start=1):
            x = x + block.ls1(block.attn(block.norm1(x)))
            if layer in (2, 4):
                tokens, regions = dhtm.hierarchical_merge(
                    x[:, prefix:], 30, regions, None if regions else (14, 14), backend="reference"
                )
                x = torch.cat([x[:, :prefix], tokens], 1)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        expected = model.forward_head(model.norm(x))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("features", ["tokens", "keys", "attention_output"])
def test_fused_and_unfused_attention_agree(features, proportional):
    model = build("q/k norm, average pooling")
    images = images_for(model)
    dhtm.patch(model, dhtm.DHTM(k=20, layers=(1, 3), features=features, proportional_attention=proportional))
    fused, regions = logits(model, images), dhtm.regions(model)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(logits(model, images), fused, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(model).assignment, regions.assignment)


def test_features_and_proportional_attention_matter():
    model, results = build("deit_tiny"), []
    images = images_for(model)
    for options in ({}, {"features": "keys"}, {"features": "attention_output"}, {"proportional_attention": True}):
        dhtm.patch(model, dhtm.DHTM(k=40, layers=(1, 3), **options))
        results.append(logits(model, images))
        dhtm.unpatch(model)
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_proportional_attention_counts_a_token_as_often_as_its_patches():
    """Equal patches: attention over merged tokens with log sizes equals attention over all of them (Bolya et al. 2023)."""
    model = build("deit_tiny", pos_embed="none")
    images = torch.ones(1, 3, 224, 224)
    plain = logits(model, images)
    dhtm.patch(model, dhtm.DHTM(k=60, layers=(1, 3), proportional_attention=True))
    torch.testing.assert_close(logits(model, images), plain, rtol=1e-4, atol=1e-4)
    dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(k=60, layers=(1, 3)))
    assert (logits(model, images) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("reducer", [dhtm.DHTM(k=40, layers=(1, 3)), RandomMerge(k=40, layers=(1, 3))])
def test_batches_of_1_and_64_give_the_same_merges(reducer):
    model = dhtm.patch(build("deit_tiny"), reducer)
    images = images_for(model, batch=64)
    with image_ids(model, torch.arange(100, 164)):
        logits(model, images)
    together = dhtm.regions(model).assignment
    for i in range(0, 64, 9):
        with image_ids(model, torch.tensor([100 + i])):
            logits(model, images[i : i + 1])
        assert torch.equal(dhtm.regions(model).assignment[0], together[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proportional", [False, True])
def test_half_precision(dtype, proportional):
    model = build("deit_tiny")
    images = images_for(model)
    dhtm.patch(model, dhtm.DHTM(k=40, layers=(1, 3), proportional_attention=proportional))
    full = logits(model, images)
    with torch.autocast("cpu", dtype=dtype):
        autocast = logits(model, images)
    half = logits(model.to(dtype), images.to(dtype))
    assert half.dtype == dtype
    for result in (half, autocast):
        assert torch.nn.functional.cosine_similarity(result.float(), full).min() > 0.98


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_backpropagates_through_the_averages(checkpointing):
    model = dhtm.patch(build("deit_tiny", drop_path_rate=0.2), dhtm.DHTM(k=40, layers=(1, 3))).train()
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(0)
    images = images_for(model).requires_grad_()
    model(images).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    patches = images.grad.unfold(2, 16, 16).unfold(3, 16, 16).abs().amax(dim=(1, 4, 5))
    assert (patches > 0).all(), "every patch has a gradient, merged or not"


def test_dynamic_image_size_follows_the_input():
    model = dhtm.patch(build("dynamic size"), dhtm.DHTM(k=5, layers=(2,)))
    logits(model, torch.randn(1, 3, 160, 96))
    assert dhtm.regions(model).grid == (10, 6) and dhtm.regions(model).n_tokens == 55
    with pytest.raises(ValueError, match="k=5 merges in layer 2, but only N=4 tokens"):
        model(torch.randn(1, 3, 32, 32))


def test_copies_and_state_dicts_are_independent():
    model = dhtm.patch(build("deit_tiny"), dhtm.DHTM(k=5, layers=(2,)))
    images = images_for(model)
    expected = logits(model, images)
    other = copy.deepcopy(model)
    dhtm.unpatch(model)
    assert torch.equal(logits(other, images), expected)
    assert dhtm.regions(other).n_tokens == 191
    dhtm.unpatch(other).load_state_dict(model.state_dict())


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "resnet18", "beit_base_patch16_224"])
def test_other_architectures_are_refused_by_name(architecture):
    model = timm.create_model(architecture, pretrained=False)
    with pytest.raises(TypeError, match=f"cannot patch a {type(model).__name__}"):
        dhtm.patch(model, dhtm.DHTM(k=4))


def test_other_blocks_are_refused_by_name():
    model = timm.create_model("vit_relpos_small_patch16_224", pretrained=False)
    with pytest.raises(TypeError, match="VisionTransformerRelPos"):
        dhtm.patch(model, dhtm.DHTM(k=4))
    block = timm.models.vision_transformer.ParallelScalingBlock
    model = timm.models.vision_transformer.VisionTransformer(depth=4, embed_dim=48, num_heads=3, block_fn=block)
    with pytest.raises(TypeError, match="layer 1 is a ParallelScalingBlock"):
        dhtm.patch(model, dhtm.DHTM(k=4, layers=(1,)))


def test_a_compiled_model_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="before wrapping or compiling"):
        dhtm.patch(torch.compile(build("deit_tiny")), dhtm.DHTM(k=4, layers=(1,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dhtm.DHTM(k=60, layers=(1, 2, 3, 4)), "k=60 merges in layer 4, but only N=16 tokens"),
        (lambda: dhtm.DHTM(k=4, layers=(2, 7)), r"layers=\[2, 7\]: the model has layers 1 to 5"),
        (lambda: dhtm.DHTM(k=4, layers=(3, 2)), r"layers=\[3, 2\]: give increasing"),
        (lambda: dhtm.DHTM(k=4, layers=(0, 2)), r"layers=\[0, 2\]: give increasing"),
        (lambda: dhtm.DHTM(k=4, layers=()), r"layers=\[\]: give increasing"),
        (lambda: dhtm.DHTM(k=-4), "k=-4"),
        (lambda: dhtm.DHTM(k=4, features="values"), "features='values'"),
        (lambda: RandomMerge(k=200, layers=(2,)), "k=200 merges in layer 2, but only N=196"),
    ],
)
def test_impossible_reductions_are_refused(make, message):
    model = build("deit_tiny")
    with pytest.raises(ValueError, match=message):
        dhtm.patch(model, make())
    assert not hasattr(model, "reduction")


def test_wrong_use_is_explained():
    model = build("deit_tiny")
    with pytest.raises(ValueError, match="not patched"):
        dhtm.regions(model)
    with pytest.raises(ValueError, match="not patched"):
        dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(k=4, layers=(2,)))
    with pytest.raises(ValueError, match="not seen an image"):
        dhtm.regions(model)
    with pytest.raises(ValueError, match="already patched"):
        dhtm.patch(model, dhtm.DHTM(k=4, layers=(2,)))
    model(images_for(model))
    with pytest.raises(ValueError, match="layer=6: the model has layers 1 to 5"):
        dhtm.regions(model, 6)
    with pytest.raises(ValueError, match="attn_mask"):
        model(images_for(model), attn_mask=torch.zeros(197, 197))


def test_patch_dropout_is_refused_while_training():
    model = dhtm.patch(build("deit_tiny", patch_drop_rate=0.5), dhtm.DHTM(k=4, layers=(2,)))
    logits(model, images_for(model))
    with pytest.raises(RuntimeError, match="patch_drop_rate=0"):
        model.train()(images_for(model))


@pytest.mark.parametrize("name", ["deit_tiny_distilled", "siglip (attention pooling)"])
def test_feature_interfaces_give_full_grids(name):
    model = build(name)
    images = images_for(model)
    options = [{}, {"indices": [1, 4], "norm": True, "return_prefix_tokens": True}, {"output_fmt": "NLC", "indices": 2}]
    options += [{"output_dict": True, "return_prefix_tokens": True, "stop_early": True, "indices": [1]}]
    plain = [model.forward_intermediates(images, **one) for one in options]
    dhtm.patch(model, dhtm.DHTM(k=0, layers=(2, 4)))
    for one, expected in zip(options, plain, strict=True):
        torch.testing.assert_close(model.forward_intermediates(images, **one), expected, rtol=0, atol=0)
    dhtm.unpatch(model)

    dhtm.patch(model, dhtm.DHTM(k=60, layers=(2, 4)))
    outputs = []
    model.blocks[2].register_forward_hook(lambda module, args, output: outputs.append(output))
    (grid,) = model.get_intermediate_layers(images, [2], reshape=True)
    tokens, regions = outputs[0][:, model.num_prefix_tokens :], dhtm.regions(model, 3)
    assert tokens.shape[1] == 136 and grid.shape == (2, 48, 14, 14)
    for patch in (0, 77, 195):
        token = regions.assignment[1, patch]
        assert torch.equal(grid[1, :, patch // 14, patch % 14], tokens[1, token])
    assert model.forward_intermediates(images)[0].shape[1] == 196 + model.num_prefix_tokens
    dhtm.unpatch(model)
    assert model.forward_intermediates.__func__ is type(model).forward_intermediates
