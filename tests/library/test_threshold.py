"""DHTM with a threshold: what each image merges, the padding that nobody may notice, FLOPs, and thresholds found on images."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import HERE, merges
from test_vit import build, images_for, logits

import dhtm
from dhtm.merge import get_neighbors, get_similarity
from dhtm.regions import grid_pairs

# But for 0, which is exact, no similarity of small integers, so that rounding decides nothing.
THRESHOLDS = {
    "cosine": (0.877, 0.491, 0.013, -2.0),
    "euclidean": (0.0, -1.491),
    "manhattan": (-2.013, -9.013),
    "kl": (-0.113, -1.013),
}


@settings(max_examples=100, deadline=None)
@given(merges(), st.data())
def test_each_image_makes_the_merges_above_the_threshold_and_no_other(case, data):
    tokens, grid, k, options = case
    options["masses"] = None
    threshold = data.draw(st.sampled_from(THRESHOLDS[options["similarity"]]))
    merged, regions = dhtm.hierarchical_merge(tokens, k, grid=grid, threshold=threshold, backend="reference", **options)
    assert merged.shape == tokens.shape
    pairs = (
        None
        if options["connectivity"] == "all"
        else set(map(tuple, grid_pairs(grid, options["connectivity"]).tolist()))
    )

    def best_pair(x, regions):
        patches = [set((regions.assignment[0] == token).nonzero()[:, 0].tolist()) for token in range(x.shape[1])]
        neighbours = get_neighbors(patches, pairs)
        return max(
            (get_similarity(x[0, i], x[0, j], options["similarity"]) for i, j in neighbours), default=-float("inf")
        )

    for image, n_left in enumerate(regions.n_tokens_of_images.tolist()):
        n_merges = tokens.shape[1] - n_left
        x, now = tokens[image : image + 1], dhtm.Regions.identity(1, grid)
        for _ in range(n_merges):
            assert best_pair(x, now) >= threshold
            x, now = dhtm.hierarchical_merge(x, 1, now, backend="reference", **options)
        assert n_merges == k or best_pair(x, now) < threshold
        assert torch.equal(regions.assignment[image], now.assignment[0])
        assert torch.equal(merged[image, :n_left], x[0]) and not merged[image, n_left:].any()


@settings(max_examples=150, deadline=None)
@given(merges(), st.data(), st.sampled_from([name for name in HERE if name != "reference"]))
def test_every_backend_stops_where_the_reference_does(case, data, backend):
    """In two layers: the second finds images of different numbers of tokens, filled up with zeros."""
    tokens, grid, k, options = case
    options["masses"] = None
    first, second = (data.draw(st.sampled_from(THRESHOLDS[options["similarity"]])) for _ in range(2))
    results = []
    for name in ("reference", backend):
        x, regions = dhtm.hierarchical_merge(tokens, k // 2, grid=grid, threshold=first, backend=name, **options)
        results.append(dhtm.hierarchical_merge(x, k, regions, threshold=second, backend=name, **options))
    (expected, expected_regions), (merged, regions) = results
    assert torch.equal(regions.assignment, expected_regions.assignment)
    assert torch.equal(regions.sizes, expected_regions.sizes)
    assert torch.equal(merged, expected)


OPTIONS = [
    {"layers": (2, 4), "features": "keys"},
    {"layers": (2, 3, 5), "proportional_attention": True, "linkage": "size"},
    {"max_merges": 60, "layers": "all", "features": "attention_output"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "deit3 (LayerScale)", "q/k norm, average pooling"])
def test_an_image_does_not_notice_the_others_of_its_batch(name, options):
    model = build(name)
    images = torch.cat([images_for(model, 3), torch.zeros_like(images_for(model, 1)), images_for(model, 1, seed=2) / 4])
    counted = {key: value for key, value in options.items() if key != "max_merges"}
    thresholds, _ = dhtm.find_thresholds(model, dhtm.DHTM(k=25, **counted), images)
    dhtm.patch(model, dhtm.DHTM(threshold=thresholds, **options))
    together, assignment = logits(model, images), dhtm.regions(model).assignment
    counts = dhtm.regions(model).n_tokens_of_images
    assert len(counts.unique()) > 1 and dhtm.regions(model).n_tokens == counts.max()
    masked = copy.deepcopy(model)
    masked.reducer.train()  # then one attention with a mask serves all images, as in compiled models
    torch.testing.assert_close(logits(masked, images), together, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(masked).assignment, assignment)
    for image in range(len(images)):
        torch.testing.assert_close(logits(model, images[image : image + 1])[0], together[image], rtol=1e-4, atol=1e-4)
        assert torch.equal(dhtm.regions(model).assignment[0], assignment[image])


def test_an_image_costs_what_it_costs_with_as_many_merges():
    for name in ("deit_tiny_distilled", "deit3 (LayerScale)"):
        model = build(name)
        n = model.patch_embed.num_patches
        for connectivity in (8, 4, "all"):
            options = {"layers": (2, 3, 5), "connectivity": connectivity}
            expected = []
            for k in (0, 30):
                dhtm.patch(model, dhtm.DHTM(k=k, **options))
                count = dhtm.count_flops(model)
                expected.append((count.total, count.merging))
                dhtm.unpatch(model)
            dhtm.patch(model, dhtm.DHTM(threshold=0.5, **options))
            tokens = torch.tensor([[n] * 5, [n, n - 30, n - 60, n - 60, n - 90]])
            assert (
                list(zip(*(one.tolist() for one in dhtm.count_flops_of_images(model, tokens)), strict=True)) == expected
            )
            with pytest.raises(ValueError, match="depend on the image"):
                dhtm.count_flops(model)
            dhtm.unpatch(model)


@pytest.mark.parametrize("reducer", [dhtm.DHTM(k=25, layers=(1, 3)), dhtm.DHTMPlus(90)])
def test_thresholds_make_as_many_merges_as_are_wanted_on_average(reducer):
    model = build("deit_tiny")
    images = images_for(model, 16)
    before = logits(model, images)
    thresholds, tokens = dhtm.find_thresholds(model, reducer, images)
    assert torch.equal(logits(model, images), before), "the model is as it was"
    same = {"proportional_attention": reducer.proportional_attention, **reducer.options}
    dhtm.patch(model, dhtm.DHTM(threshold=thresholds, layers=reducer.layers, **same))
    logits(model, images)
    found = torch.stack([dhtm.regions(model, layer).n_tokens_of_images for layer in range(1, 6)], dim=1)
    assert torch.equal(found, tokens)
    made = -found.float().mean(dim=0).diff(prepend=torch.tensor([196.0]))
    for layer in range(1, 6):
        wanted = reducer.merges_in(layer) if layer in reducer.schedule else 0
        assert made[layer - 1] == pytest.approx(wanted, abs=1)
        assert wanted or layer not in reducer.schedule or thresholds[reducer.schedule.index(layer)] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5, "k": 3}, "give exactly one"),
        ({}, "give exactly one"),
        ({"k": 3, "max_merges": 3}, "there is none"),
        ({"threshold": 0.5, "max_merges": -1}, "from 0"),
        ({"threshold": 0.5, "mass": "size"}, "no scale"),
        ({"threshold": [0.5, 0.6]}, "one for each of 3 layers"),
        ({"threshold": "high"}, "give one number"),
    ],
)
def test_bad_options_are_named(options, message):
    model = build("deit_tiny")
    with pytest.raises(ValueError, match=message):
        dhtm.patch(model, dhtm.DHTM(**{"layers": (1, 2, 3), **options}))
    assert not hasattr(model, "reduction")


def test_a_model_that_pools_by_attention_is_refused():
    with pytest.raises(ValueError, match="global_pool='map'"):
        dhtm.patch(build("siglip (attention pooling)"), dhtm.DHTM(threshold=0.9, layers=(1, 2)))
