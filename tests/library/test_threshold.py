"""DHTM with a threshold in models: padding that must not change results, FLOPs, and thresholds found on images."""

import copy

import pytest
import torch
from networks import build, images_for, logits

import dhtm


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled", {"layers": (2, 4), "features": "keys"}),
        ("deit3 (LayerScale)", {"layers": (2, 3, 5), "proportional_attention": True, "linkage": "size"}),
        ("q/k norm, average pooling", {"max_merges": 60, "layers": "all", "features": "attention_output"}),
        ("dinov3", {"layers": (1, 3)}),
        ("rope, mixed axes for each head", {"layers": (1, 3)}),
    ],
)
def test_result_does_not_depend_on_the_other_images_of_the_batch(name, options):
    model = build(name)
    images = torch.cat([images_for(model, 3), torch.zeros_like(images_for(model, 1)), images_for(model, 1, seed=2) / 4])
    counted = {key: value for key, value in options.items() if key != "max_merges"}
    thresholds, _ = dhtm.find_thresholds(model, dhtm.DHTM(k=15, **counted), images)
    dhtm.patch(model, dhtm.DHTM(threshold=thresholds, **options))
    together, assignment = logits(model, images), dhtm.regions(model).assignment
    counts = dhtm.regions(model).n_tokens_of_images
    assert len(counts.unique()) > 1 and dhtm.regions(model).n_tokens == counts.max()
    masked = copy.deepcopy(model)
    masked.reducer.train()  # one masked attention then computes all images, as in compiled models
    torch.testing.assert_close(logits(masked, images), together, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(masked).assignment, assignment)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.cosine_similarity(logits(model, images).float(), together).min() > 0.95
    for image in range(len(images)):
        torch.testing.assert_close(logits(model, images[image : image + 1])[0], together[image], rtol=1e-4, atol=1e-4)
        assert torch.equal(dhtm.regions(model).assignment[0], assignment[image])


def test_pooling_may_change_after_patching_and_a_batch_may_be_empty():
    before, after = build("112"), build("112")
    images = images_for(before, 3)
    before.reset_classifier(7, "avg")
    for model in (before, after):
        dhtm.patch(model, dhtm.DHTM(threshold=0.8, layers=(2, 4)))
    after.reset_classifier(7, "avg")
    after.head.load_state_dict(before.head.state_dict())
    assert torch.equal(logits(after, images), logits(before, images))
    assert len(dhtm.regions(after).n_tokens_of_images.unique()) > 1
    assert logits(after, images[:0]).shape == (0, 7)


@pytest.mark.parametrize("connectivity", [8, "all"])
def test_flops_of_an_image_equal_those_with_a_fixed_number_of_merges(connectivity):
    model, options, expected = build("deit_tiny_distilled"), {"layers": (2, 3, 5), "connectivity": connectivity}, []
    for k in (0, 30):
        count = dhtm.count_flops(dhtm.patch(model, dhtm.DHTM(k=k, **options)))
        expected.append((count.total, count.merging))
        dhtm.unpatch(model)
    dhtm.patch(model, dhtm.DHTM(threshold=0.5, **options))
    tokens = torch.tensor([[196] * 5, [196, 166, 136, 136, 106]])
    for dtype in (torch.float32, torch.bfloat16):  # a run counts with the model that predicted, in its dtype
        total, merging = dhtm.count_flops_of_images(model.to(dtype), tokens)
        assert list(zip(total.tolist(), merging.tolist(), strict=True)) == expected
    with pytest.raises(ValueError, match="depend on the image"):
        dhtm.count_flops(model)


@pytest.mark.parametrize("reducer", [dhtm.DHTM(k=25, layers=(1, 3)), dhtm.DHTMPlus(90)])
def test_found_thresholds_make_the_requested_merges_on_average(reducer):
    model = build("deit_tiny")
    images = images_for(model, 16)
    before = logits(model, images)
    thresholds, tokens = dhtm.find_thresholds(model, reducer, images)
    assert torch.equal(logits(model, images), before), "the model is not changed"
    options = {"proportional_attention": reducer.proportional_attention, **reducer.options}
    dhtm.patch(model, dhtm.DHTM(threshold=thresholds, layers=reducer.layers, **options))
    logits(model, images)
    n_tokens = torch.stack([dhtm.regions(model, layer).n_tokens_of_images for layer in range(1, 6)], dim=1)
    assert torch.equal(n_tokens, tokens)
    merges = -n_tokens.float().mean(dim=0).diff(prepend=torch.tensor([196.0]))
    for layer in range(1, 6):
        expected = reducer.merges_in(layer) if layer in reducer.schedule else 0
        assert merges[layer - 1] == pytest.approx(expected, abs=1)
        assert expected or layer not in reducer.schedule or thresholds[reducer.schedule.index(layer)] > 1


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"k": 5, "similarity": "euclidean"}, {"k": 5, "mass": "size"}])
def test_finding_thresholds_needs_counted_merges_by_plain_cosine(options):
    with pytest.raises(ValueError, match="with k or total, similarity='cosine' and mass=None"):
        dhtm.find_thresholds(build("deit_tiny"), dhtm.DHTM(**options), torch.zeros(1, 3, 64, 64))


def test_model_with_attention_pooling_raises():
    with pytest.raises(ValueError, match="global_pool='map'"):
        dhtm.patch(build("siglip (attention pooling)"), dhtm.DHTM(threshold=0.9, layers=(1, 2)))
