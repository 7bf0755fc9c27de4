"""dhtm.patch on supported and unsupported models."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from networks import SMALL, build, forward, images_for, logits
from timm.models.naflexvit import checkpoint_filter_fn
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

import baselines
import dhtm
from dhtm.vit import image_shape, tokens_by_layer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny", {}),
        ("deit_tiny", {"features": "keys"}),
        ("deit3 (LayerScale)", {"features": "attention_output", "linkage": "size"}),
        ("q/k norm, average pooling", {"features": "keys", "proportional_attention": True}),
        ("siglip (attention pooling)", {"proportional_attention": True}),
    ],
)
def test_patched_model_merges_between_attention_and_mlp(name, options):
    model = build(name)
    image, prefix, all_regions = images_for(model, batch=1), model.num_prefix_tokens, []
    reducer = dhtm.DHTM(k=30, layers=(2, 4), **options)
    got = logits(dhtm.patch(model, reducer), image)
    dhtm.unpatch(model)

    def merge(layer, x, sizes, keys, output):
        if layer not in (2, 4):
            return x, sizes
        features = {"keys": keys.transpose(0, 1).flatten(1), "attention_output": output}.get(reducer.features, x)
        regions, grid = (all_regions[-1], None) if all_regions else (None, model.patch_embed.grid_size)
        options = reducer.options | {"features": features[None, prefix:], "backend": "reference"}
        tokens, regions = dhtm.hierarchical_merge(x[None, prefix:], 30, regions, grid, **options)
        all_regions.append(regions)
        return torch.cat([x[:prefix], tokens[0]]), torch.cat([torch.ones(prefix), regions.sizes[0]])

    expected = forward(model, image, merge, reducer.proportional_attention)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_copy_of_a_patched_model_is_independent():
    model = dhtm.patch(build("deit_tiny"), dhtm.DHTM(k=5, layers=(2,)))
    images = images_for(model)
    expected = logits(model, images)
    other = copy.deepcopy(model)
    dhtm.unpatch(model)
    assert torch.equal(logits(other, images), expected)
    assert dhtm.regions(other).n_tokens == 191
    dhtm.unpatch(other).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "cannot patch a SwinTransformer: only timm's"),
        (
            lambda: VisionTransformer(depth=1, embed_dim=48, num_heads=3, block_fn=ParallelScalingBlock),
            "layer 1 is a ParallelScalingBlock",
        ),
        (lambda: torch.compile(build("deit_tiny")), "before wrapping or compiling"),
    ],
)
def test_unsupported_models_raise(make, message):
    with pytest.raises(TypeError, match=message):
        dhtm.patch(make(), dhtm.DHTM(k=4, layers=(1,)))


def test_wrong_use_raises():
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


@pytest.mark.parametrize(("gradients", "layer"), [(False, 3), (True, 3), (False, 4)])
def test_concurrent_threads_on_one_model_raise(gradients, layer):
    """A forward pass in another thread would change the regions, or the bias after the last merge, of one that is running."""
    model = dhtm.patch(build("112"), dhtm.DHTM(k=15, layers=(2, 4), proportional_attention=True))
    mine, other = images_for(model, seed=1), images_for(model, seed=2)
    run = (lambda images: model(images).detach()) if gradients else functools.partial(logits, model)
    expected = [run(images) for images in (mine, other)]
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(run, mine).result(), expected[0]), "threads may run one after the other"
        results = []

        def interrupt(*_):
            handle.remove()
            results.append(thread.submit(run, other).result())

        handle = model.blocks[layer - 1].register_forward_hook(interrupt)
        with pytest.raises(RuntimeError, match=r"two threads use one patched model .* copy.deepcopy\(model\)"):
            run(mine)
    assert torch.equal(results[0], expected[1])
    assert torch.equal(run(mine), expected[0])


def test_backward_may_rerun_checkpointed_layers_in_another_thread():
    model = dhtm.patch(build("112").train(), dhtm.DHTM(k=15, layers=(2, 4)))
    model.set_grad_checkpointing()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(model(images_for(model)).sum().backward).result()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_models_of_different_depths_cannot_share_a_reducer():
    """With layers="all", a reducer has the layers of the model that it was last patched into."""
    reducer, deep = dhtm.DHTMPlus(30), build("112")
    for model in (deep, build("112", depth=4)):
        assert logits(dhtm.patch(model, reducer), images_for(model)).shape == (2, 1000)
    with pytest.raises(RuntimeError, match="give each model a reducer of its own"):
        logits(deep, images_for(deep))


def test_patch_dropout_raises_in_training_mode():
    model = dhtm.patch(build("deit_tiny", patch_drop_rate=0.5), dhtm.DHTM(k=4, layers=(2,)))
    logits(model, images_for(model))
    with pytest.raises(RuntimeError, match="patch_drop_rate=0"):
        model.train()(images_for(model))


@pytest.mark.parametrize("name", ["deit_tiny_distilled", "siglip (attention pooling)"])
def test_feature_interfaces_return_full_grids(name):
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


def test_feature_interface_of_eva_works_without_prefix_tokens():
    model = build("perception encoder", class_token=False)
    images = images_for(model)
    final, (grid,) = model.forward_intermediates(images, [1])
    dhtm.patch(model, dhtm.DHTM(k=0, layers=(2,)))
    torch.testing.assert_close(model.forward_intermediates(images, [1]), (final, [grid]), rtol=0, atol=0)


@pytest.mark.parametrize(
    "reducer",
    [dhtm.DHTM(threshold=0.5, max_merges=40, layers=(2, 4)), baselines.ToMe(8), baselines.KMedoids(0.7, layers=(2, 4))],
)
def test_patched_naflex_gives_the_logits_of_the_patched_vit(reducer):
    """Compare also regions and FLOPs; both models have the same weights."""
    classic = build("deit_tiny", init_values=0.1)
    classic.pos_embed.data[:, 0] = 0  # NaFlexVit gives the CLS token no position
    options = {"class_token": True, "global_pool": "token", "fc_norm": False, "reg_tokens": 0, "num_classes": 1000}
    options |= {"pos_embed_grid_size": (14, 14), "pretrained_cfg_overlay": {"input_size": (3, 224, 224)}}
    naflex = build("naflex", **options)
    naflex.load_state_dict(checkpoint_filter_fn(classic.state_dict(), naflex))
    images = images_for(classic)
    expected, regions = logits(dhtm.patch(classic, reducer), images), dhtm.regions(classic)
    flops = None if reducer.adaptive else dhtm.count_flops(classic)
    dhtm.unpatch(classic)
    torch.testing.assert_close(logits(dhtm.patch(naflex, reducer), images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(naflex).assignment, regions.assignment)
    # NaFlexVit embeds patches by a linear layer, which has as many FLOPs as the convolution.
    assert flops is None or dhtm.count_flops(naflex) == flops


def test_naflex_on_a_dict_of_patches_raises():
    naflex = dhtm.patch(build("naflex"), dhtm.DHTM(k=3, layers=(2,)))
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    patches = {"patches": torch.zeros(1, 16, 768), "patch_coord": coordinates}
    with pytest.raises(ValueError, match="not patches"):
        naflex(patches | {"patch_valid": torch.ones(1, 16, dtype=bool)})


def test_naflex_may_lack_a_position_grid_or_a_pretrained_config():
    rotary = build("naflex, axial", pos_embed="none", num_classes=7)
    rotary.embeds.pos_embed_grid_size = None
    assert logits(dhtm.patch(rotary, dhtm.DHTM(k=3, layers=(2,))), torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    direct = timm.models.NaFlexVit(**SMALL, pos_embed_grid_size=(4, 4))
    dhtm.patch(direct, dhtm.DHTM(k=3, layers=(2,)))
    assert image_shape(direct) == (3, 64, 64) and tokens_by_layer(direct) == [16, 13, 13, 13, 13]
