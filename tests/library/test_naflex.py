"""timm's NaFlexVit: on images of one size it is the classic model with the same weights, and so is a patched one."""

import pytest
import timm
import torch
from networks import SMALL, build, images_for, logits
from timm.models.naflexvit import checkpoint_filter_fn

import baselines
import dhtm
from dhtm.vit import image_shape, tokens_by_layer


@pytest.mark.parametrize(
    "reducer",
    [
        dhtm.DHTM(k=20, layers=(2, 4)),
        dhtm.DHTM(threshold=0.5, max_merges=40, layers=(2, 4)),
        dhtm.DHTMPlus(60),
        baselines.ToMe(8),
        baselines.KMedoids(0.7, layers=(2, 4)),
    ],
)
def test_it_is_the_classic_model(reducer):
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
    # A linear layer embeds the patches, whose FLOPs are those of the convolution.
    assert flops is None or dhtm.count_flops(naflex) == flops


def test_images_of_unlike_sizes_are_refused():
    naflex = dhtm.patch(build("naflex"), dhtm.DHTM(k=3, layers=(2,)))
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    patches = {"patches": torch.zeros(1, 16, 768), "patch_coord": coordinates}
    with pytest.raises(ValueError, match="not patches"):
        naflex(patches | {"patch_valid": torch.ones(1, 16, dtype=bool)})


def test_models_without_a_grid_of_positions_or_without_a_pretrained_config():
    rotary = build("naflex, axial", pos_embed="none", num_classes=7)
    rotary.embeds.pos_embed_grid_size = None
    assert logits(dhtm.patch(rotary, dhtm.DHTM(k=3, layers=(2,))), torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    direct = timm.models.NaFlexVit(**SMALL, pos_embed_grid_size=(4, 4))
    dhtm.patch(direct, dhtm.DHTM(k=3, layers=(2,)))
    assert image_shape(direct) == (3, 64, 64) and tokens_by_layer(direct) == [16, 13, 13, 13, 13]
