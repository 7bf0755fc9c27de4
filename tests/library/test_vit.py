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


class Spy(dhtm.Reducer):
    """Reduces nothing and remembers what it was shown."""

    needs = frozenset({"keys", "output"})

    def tokens_after(self, n_tokens, layer, grid):
        return n_tokens

    def forward(self, tokens, regions, attention):
        self.seen = attention
        return tokens, regions


@pytest.mark.parametrize("position", ["after_attention", "before_block"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "q/k norm, average pooling"])
def test_a_reducer_sees_the_keys_and_the_output_of_the_attention_before_it(name, position):
    model, inputs = build(name), []
    spy = Spy(layers=(2,))
    spy.position = position
    if position == "before_block":
        with pytest.raises(ValueError, match="Spy acts before a block, where its attention has no output yet"):
            dhtm.patch(model, spy)
        spy.needs = frozenset({"keys"})
    dhtm.patch(model, spy)
    attention = model.blocks[1 if position == "after_attention" else 0].attn
    attention.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
    logits(model, images_for(model))
    ((normed, output),) = inputs
    prefix = model.num_prefix_tokens
    with torch.inference_mode():
        _, keys, _ = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
        keys = attention.k_norm(keys)[:, prefix:].transpose(1, 2)
    torch.testing.assert_close(spy.seen.keys, keys)
    if position == "after_attention":
        torch.testing.assert_close(spy.seen.output, output[:, prefix:])
    assert spy.seen.layer == 2 and spy.seen.cls is None


@pytest.mark.parametrize("position", ["after_attention", "before_block"])
def test_checkpointing_shows_a_reducer_the_same_again(position):
    class Diary(Spy):
        def forward(self, tokens, regions, attention):
            seen.append(attention)
            return tokens, regions

    model, seen, diary = build("deit_tiny"), [], Diary(layers=(2, 4))
    diary.position, diary.needs = position, frozenset({"keys", "cls"})
    dhtm.patch(model, diary).train().set_grad_checkpointing()
    model(images_for(model)).sum().backward()
    assert [attention.layer for attention in seen] == [2, 4, 4, 2]
    for first, again in zip(seen[:2], reversed(seen[2:]), strict=True):
        torch.testing.assert_close(again.keys, first.keys)
        torch.testing.assert_close(again.cls, first.cls)


class Gather(dhtm.Reducer):
    """Averages the first 21 tokens, and remembers what attention it was shown in each layer."""

    needs = frozenset({"cls"})

    def __init__(self, position, proportional=False):
        super().__init__(layers=(2, 4))
        self.position, self.proportional_attention, self.seen = position, proportional, {}

    def tokens_after(self, n_tokens, layer, grid):
        return n_tokens - 20

    def forward(self, tokens, regions, attention):
        self.seen[attention.layer] = attention
        token_map = (torch.arange(tokens.shape[1]) - 20).clamp(min=0).expand(len(tokens), -1)
        new = torch.cat([tokens[:, :21].mean(dim=1, keepdim=True), tokens[:, 21:]], dim=1)
        return new, regions.merged(token_map, tokens.shape[1] - 20)


def probabilities(attention, normed, sizes=None):
    """Unfused attention in float32, [B, heads, S, S], and its values, from the input of timm's module."""
    queries, keys, values = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = attention.q_norm(queries).float(), attention.k_norm(keys).float()
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    return (scores if sizes is None else scores + sizes.log()[:, None, None]).softmax(-1), values


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("position", ["after_attention", "before_block"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "dinov2 with registers", "q/k norm, average pooling"])
def test_a_reducer_sees_the_attention_of_cls_or_without_one_of_all(name, position, proportional):
    model, inputs = build(name), []
    reducer = Gather(position, proportional)
    dhtm.patch(model, reducer)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, output: inputs.append((module, args[0], output)))
    logits(model, images_for(model))
    prefix, has_cls = model.num_prefix_tokens, name != "q/k norm, average pooling"
    for layer, (attention, normed, output) in enumerate(inputs, start=1):
        reduced = layer if position == "before_block" else layer - 1  # the last layer that reduced before it, or none
        sizes = torch.ones(normed.shape[:2])
        if proportional and reduced:
            sizes[:, prefix:] = dhtm.regions(model, reduced).sizes
        with torch.inference_mode():
            shares, values = probabilities(attention, normed, sizes)
            expected = attention.proj((shares @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)  # the attention that the model computes
        reads = layer + 1 if position == "before_block" else layer
        if reads in (2, 4):
            expected = (shares[:, :, 0] if has_cls else shares.mean(2)).mean(1)[:, prefix:]
            torch.testing.assert_close(reducer.seen[reads].cls, expected, rtol=1e-4, atol=1e-6)
            assert reducer.seen[reads].layer == reads and reducer.seen[reads].keys is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_attention_of_cls_is_float32_in_half_precision(autocast):
    model, inputs = build("deit_tiny"), []
    model, images = (model, images_for(model)) if autocast else (model.bfloat16(), images_for(model).bfloat16())
    reducer = Gather("before_block")
    dhtm.patch(model, reducer)
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits(model, images)
    with torch.inference_mode():
        weights = [weight.bfloat16() for weight in (attention.qkv.weight, attention.qkv.bias)]
        qkv = torch.nn.functional.linear(inputs[0].bfloat16(), *weights)
        queries, keys, _ = qkv.float().unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        shares = (queries[:, :, :1] @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1)
    assert reducer.seen[2].cls.dtype == torch.float32
    torch.testing.assert_close(reducer.seen[2].cls, shares.mean(dim=(1, 2))[:, 1:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("deit_tiny_distilled", "all", (48, 2, (14, 14), (1, 2, 3, 4, 5))),
        ("dinov2 with registers", (2, 4), (48, 5, (8, 8), (2, 4))),
        ("siglip (attention pooling)", (3,), (48, 0, (14, 14), (3,))),
        ("224x336", (2,), (48, 1, (14, 21), (2,))),
    ],
)
def test_a_reducer_is_told_of_the_model_before_its_tokens_are_planned(name, layers, expected):
    class Told(dhtm.DHTM):
        def attach(self, *model):
            super().attach(*model)
            self.model = model

        def tokens_after(self, n_tokens, layer, grid):
            assert self.model == expected and self.schedule == expected[3] and self.n_prefix == expected[1]
            return super().tokens_after(n_tokens, layer, grid)

    told = Told(k=5, layers=layers)
    dhtm.patch(build(name), told)
    assert told.model == expected


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
