"""What tests of merging methods share: a whole model written out for one image, and averages over groups of tokens."""

import torch


def average(x, sizes, groups):
    """The tokens and sizes after x [S, D] of these sizes were merged in groups of old positions."""
    places = torch.tensor([(new, old) for new, group in enumerate(groups) for old in group]).T
    shares = torch.zeros(len(groups), len(x), dtype=x.dtype)
    shares[places[0], places[1]] = sizes[places[1]].to(x.dtype)
    sizes = shares.sum(1)
    return shares @ x / sizes[:, None], sizes


def forward(model, image, groups_of, proportional, weighted=True):
    """The logits of one image, unfused attention and merging after it written into timm's own modules.

    Args:
        groups_of: called with (layer, keys [S, d], averaged over heads and float64), returns groups of positions.
        proportional: add log sizes to the attention logits.
        weighted: average by sizes; else evenly, forgetting sizes after each layer.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))[0]
    sizes = torch.ones(len(x))
    for layer, block in enumerate(model.blocks, start=1):
        qkv = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, block.attn.num_heads, -1)
        queries, keys, values = qkv.permute(1, 2, 0, 3)
        scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
        scores = scores + sizes.log() if proportional else scores
        x = x + block.attn.proj((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
        x, sizes = average(x, sizes, groups_of(layer, keys.mean(0).double().numpy()))
        sizes = sizes if weighted else torch.ones_like(sizes)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x[None]))


def sharpen(model):
    """Make attention sharp, so that its keys and sizes matter."""
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=2 * model.embed_dim**-0.5)
        torch.nn.init.normal_(block.attn.proj.weight, std=model.embed_dim**-0.5)
    return model


def on_patches(groups, n_prefix):
    """Groups of patch tokens as groups of positions, prefix tokens before them."""
    return [[i] for i in range(n_prefix)] + [[i + n_prefix for i in group] for group in groups]


def unequal_regions(n, seed):
    """Two images' n tokens of one to several patches in a row: (assignment [2, n + 6], sizes [2, n])."""
    rng = torch.Generator().manual_seed(seed)
    patches = torch.cat([torch.arange(n), torch.randint(n, (6,), generator=rng)])
    assignment = torch.stack([patches, patches.flip(0)])
    return assignment, torch.stack([image.bincount(minlength=n) for image in assignment])


def check_step(reducer, tokens, regions, attention, groups_of_image):
    """One call of a reducer gives the averages of the groups [B][M] of tokens, weighted by patches, and their regions."""
    new_tokens, new_regions = reducer(tokens, regions, attention)
    for image, groups in enumerate(groups_of_image):
        expected, sizes = average(tokens[image], regions.sizes[image], groups)
        torch.testing.assert_close(new_tokens[image], expected)
        assert new_regions.sizes[image].tolist() == sizes.tolist()
        place = {token: new for new, group in enumerate(groups) for token in group}
        assert new_regions.assignment[image].tolist() == [place[token] for token in regions.assignment[image].tolist()]
