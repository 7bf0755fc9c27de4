"""Small models, all methods and a reference forward pass, for the tests of the library and of the methods."""

import functools

import timm
import torch

import baselines
import dhtm
from dhtm.vit import image_shape

# Real architectures, because the parts of their blocks matter, with few blocks and heads so that tests take seconds.
SMALL = {"depth": 5, "embed_dim": 48, "num_heads": 3}
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "112": ("deit_tiny_patch16_224", {"img_size": 112}),
    "224x336": ("deit_tiny_patch16_224", {"img_size": (224, 336)}),
    "dynamic size": ("deit_tiny_patch16_224", {"dynamic_img_size": True}),
    "deit_tiny_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3 (LayerScale)": ("deit3_small_patch16_224", {}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 112, "num_classes": 10}),
    "siglip (attention pooling)": ("vit_base_patch16_siglip_224", {"num_classes": 10}),
    "q/k norm, average pooling": ("vit_medium_patch16_gap_256", {"qk_norm": True}),
    "eva without rotations": (  # has a class token, but no attribute has_class_token
        "eva02_tiny_patch14_224",
        {"img_size": 112, "use_rot_pos_emb": False, "use_abs_pos_emb": True, "qkv_fused": True, "qkv_bias": False},
    ),
    "naflex": (
        "naflexvit_base_patch16_gap",
        {"pos_embed_grid_size": (8, 8), "pretrained_cfg_overlay": {"input_size": (3, 128, 128)}},
    ),
}
ROTARY = {
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
METHODS = {  # functions that take layers=
    "DHTM": functools.partial(dhtm.DHTM, 20, features="keys", proportional_attention=True),
    "DHTM, all pairs": functools.partial(dhtm.DHTM, 20, connectivity="all"),
    "DHTMPlus": functools.partial(dhtm.DHTMPlus, 40, inflect=0, mass="attention"),  # 20 in each of two layers
    "RandomMerge": functools.partial(baselines.RandomMerge, 20),
    "ToMe": functools.partial(baselines.ToMe, 20),
    "LoTM": functools.partial(baselines.LoTM, 20),
    "PiToMe": functools.partial(baselines.PiToMe, 0.9),
    "ATC": functools.partial(baselines.ATC, 0.3),
    "KMedoids": functools.partial(baselines.KMedoids, 0.3),
    "DPCKNN": functools.partial(baselines.DPCKNN, 0.3),
    "DPCKNN, weighted": functools.partial(baselines.DPCKNN, 0.3, weighted=True),
    "TokenMergence": functools.partial(baselines.TokenMergence, 0.3),
    "PatchMerger": functools.partial(baselines.PatchMerger, 0.3),
    "Sinkhorn": functools.partial(baselines.Sinkhorn, 0.3),
    "SiT": functools.partial(baselines.SiT, 0.3),
}


def build(name, **overrides):
    architecture, options = (MODELS | ROTARY)[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, **(SMALL | options | overrides)).eval()
    for key, parameter in model.named_parameters():
        if "rope" in key:
            continue
        # LayerScale and biases start near zero, which would hide that one is not applied.
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.2, 1)
    return model


def randomise_reducer(model):
    """Randomise the reducer's parameters, because those that start at zero would hide a mistake; return the model."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def images_for(model, batch=2, seed=1):
    coarse = torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=image_shape(model)[1:], mode="bicubic")


def logits(model, images):
    with torch.inference_mode():
        return model(images)


def attend(attention, normed, sizes=None):
    """Run a timm attention unfused, with log sizes added; return shares [B, heads, S, S], keys [B, heads, S, d], output."""
    queries, keys, values = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    scores = (queries.float() @ keys.float().transpose(2, 3)) / queries.shape[-1] ** 0.5
    shares = (scores if sizes is None else scores + sizes.log()[:, None, None]).softmax(-1)
    return shares, keys, attention.proj((shares.to(values.dtype) @ values).transpose(1, 2).flatten(2))


@torch.inference_mode()
def forward(model, image, merge, proportional):
    """Return the logits of one image, computed by timm's modules with unfused attention and a merge after it.

    Args:
        merge: called with (layer, x [S, D], sizes [S], keys [heads, S, d], attention output [S, D]), returns x and sizes.
        proportional: add log sizes to the attention logits.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    sizes = torch.ones(x.shape[1])
    for layer, block in enumerate(model.blocks, start=1):
        _, keys, output = attend(block.attn, block.norm1(x), sizes[None] if proportional else None)
        x, sizes = merge(layer, (x + block.ls1(output))[0], sizes, keys[0], output[0])
        x = x[None] + block.ls2(block.mlp(block.norm2(x[None])))
    return model.forward_head(model.norm(x))


def average(x, sizes, groups):
    """Merge x [S, D] of these sizes in groups of positions; return the weighted averages and their sizes."""
    new = torch.stack([(x[group] * sizes[group, None]).sum(0) / sizes[group].sum() for group in groups])
    return new, torch.stack([sizes[group].sum() for group in groups])


def check_step(reducer, tokens, regions, attention, groups_of_image):
    """Check that a reducer returns the averages of the groups [B][M] of tokens, weighted by patches, and their regions."""
    new_tokens, new_regions = reducer(tokens, regions, attention)
    for image, groups in enumerate(groups_of_image):
        expected, sizes = average(tokens[image], regions.sizes[image], groups)
        torch.testing.assert_close(new_tokens[image], expected)
        assert new_regions.sizes[image].tolist() == sizes.tolist()
        place = {token: new for new, group in enumerate(groups) for token in group}
        assert new_regions.assignment[image].tolist() == [place[token] for token in regions.assignment[image].tolist()]


def unequal_tokens(n, seed, n_prefix=0):
    """Return n tokens of one or more patches in each of two images, their regions in a grid of one row, and the keys of all."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, 5, generator=rng, dtype=torch.float64)
    keys = torch.randn(2, 3, n_prefix + n, 4, generator=rng)
    patches = torch.cat([torch.arange(n), torch.randint(n, (6,), generator=rng)])
    assignment = torch.stack([patches, patches.flip(0)])
    sizes = torch.stack([image.bincount(minlength=n) for image in assignment])
    return tokens, dhtm.Regions(assignment, sizes, (1, n + 6)), keys
