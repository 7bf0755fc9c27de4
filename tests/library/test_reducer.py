"""What every token reduction method promises in a model, and the parts that the methods share."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from test_vit import build, images_for, logits

import dhtm
from baselines import ATC, DPCKNN, KMedoids, LoTM, PatchMerger, PiToMe, Sinkhorn, SiT, TokenMergence, ToMe
from dhtm import Regions
from dhtm.reducer import Attention, highest, squared_distances
from dhtm.vit import tokens_by_layer

METHODS = {
    method.__name__: method
    for method in (ToMe, LoTM, PiToMe, ATC, KMedoids, DPCKNN, TokenMergence, PatchMerger, Sinkhorn, SiT)
}
METHODS["DHTMPlus"] = functools.partial(dhtm.DHTMPlus, inflect=0, mass="attention")  # as many merges in each layer
MERGING = {"ToMe": 20, "LoTM": 20, "PiToMe": 0.9, "DHTMPlus": 40}  # knobs; the other methods have a keep rate
KEEP_RATE = [name for name in METHODS if name not in MERGING]
LEARNED = ("PatchMerger", "Sinkhorn", "SiT")
NETWORKS = {  # parameters in the state dict, where reduction is before layers 2 and 4
    "PatchMerger": {f"stages.{layer}.{name}" for layer in (2, 4) for name in ("norm.weight", "norm.bias", "queries")},
    "Sinkhorn": {f"stages.{layer}.centres" for layer in (2, 4)},
    "SiT": {f"stages.{layer}.scale" for layer in (2, 4)}
    | {f"stages.{layer}.mlp.{i}.{kind}" for layer in (2, 4) for i in (0, 1, 3) for kind in ("weight", "bias")},
    "TokenMergence": {f"views.{scale}.{kind}" for scale in (2, 4) for kind in ("weight", "bias")},
    "DPCKNN, weighted": {f"scores.{layer}.{kind}" for layer in (2, 4) for kind in ("weight", "bias")},
}


def make(name, knob=None, layers=(2, 4)):
    if name == "DPCKNN, weighted":
        return DPCKNN(knob or 0.3, layers=layers, weighted=True)
    return METHODS[name](knob or MERGING.get(name, 0.3), layers=layers)


def small(**options):
    return build("deit_tiny", img_size=112, **options)


def shaken(model):
    """The model, its reducer's parameters at random: what starts at zero would hide a mistake."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", [*METHODS, "DPCKNN, weighted"])
@pytest.mark.parametrize(
    "model_name", ["deit_tiny_distilled", "dinov2 with registers", "q/k norm, average pooling", "224x336"]
)
def test_in_a_model(name, model_name):
    model = build(model_name)
    images = images_for(model, batch=3)
    plain = logits(model, images)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shaken(dhtm.patch(model, make(name)))
    lengths = []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, x: lengths.append(x.shape[1] - model.num_prefix_tokens))
    reduced, regions = logits(model, images), dhtm.regions(model)
    assert reduced.shape == plain.shape and reduced.isfinite().all()
    assert (reduced != plain).any(dim=1).all()

    n_patches = math.prod(model.patch_embed.grid_size)
    if name == "PiToMe":
        first = n_patches - math.floor(n_patches - n_patches * 0.9)
        second = first - math.floor(first - first * 0.9)
    elif name in MERGING:
        first, second = n_patches - 20, n_patches - 40
    else:
        first, second = (math.floor(n_patches * Fraction(3, 10) ** i) for i in (1, 2))
    assert lengths == tokens_by_layer(model) == [n_patches, first, first, second, second]
    for layer, n_tokens in enumerate(lengths, start=1):
        of_layer = dhtm.regions(model, layer)
        counts = torch.stack([image.bincount(minlength=n_tokens) for image in of_layer.assignment])
        assert torch.equal(of_layer.sizes, counts) and of_layer.n_tokens == n_tokens
        assert (of_layer.sizes.sum(1) == n_patches).all()

    for i in (0, 2):
        torch.testing.assert_close(logits(model, images[i : i + 1]), reduced[i : i + 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(dhtm.regions(model).assignment[0], regions.assignment[i])

    dhtm.unpatch(model)
    assert torch.equal(logits(model, images), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(model.state_dict()) == set(state)


@pytest.mark.parametrize("name", [*METHODS, "DPCKNN, weighted"])
def test_half_precision(name):
    model = small()
    images = images_for(model)
    shaken(dhtm.patch(model, make(name)))
    full = logits(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = logits(model, images)
        assert (dhtm.regions(model).sizes.sum(1) == 49).all()
    half = logits(model.to(torch.bfloat16), images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (dhtm.regions(model).sizes.sum(1) == 49).all()
    for result in (half, autocast):
        assert torch.nn.functional.cosine_similarity(result.float(), full).min() > 0.95


@pytest.mark.parametrize("name", ["ToMe", "LoTM", "PiToMe", "ATC", "KMedoids", "DPCKNN", "TokenMergence", "DHTMPlus"])
def test_autocast_does_not_change_which_tokens_merge(name):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 196, 6, generator=rng)
    attention = Attention(
        1,
        keys=torch.randn(4, 3, 196, 2, generator=rng),
        cls=torch.rand(4, 196, generator=rng),
        received=torch.rand(4, 196),
    )
    reducer = make(name, {"ToMe": 40, "LoTM": 40, "PiToMe": 0.8, "DHTMPlus": 40}.get(name, 0.05), layers=(1,))
    reducer.attach(6, 1, (14, 14), (1,))
    arguments = tokens, Regions.identity(4, (14, 14)), attention
    with torch.no_grad():
        expected = reducer(*arguments)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reducer(*arguments)[1].assignment, expected.assignment)


@pytest.mark.parametrize("name", [*METHODS, "DPCKNN, weighted"])
def test_every_parameter_and_patch_has_the_same_gradient_with_checkpointing(name):
    model = shaken(dhtm.patch(small(), make(name))).train()
    images = images_for(model).requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        images.grad = None
        model(images).square().sum().backward()
        assert (images.grad.unfold(2, 16, 16).unfold(3, 16, 16).abs().amax(dim=(1, 4, 5)) > 0).all()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()} | {"": images.grad})
    noise = 1e-9 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert gradient.isfinite().all(), key
        assert gradient.any() or (key.startswith("reducer.scores") and key.endswith("bias")), key  # that one cancels
        atol = noise + 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", [*METHODS, "DPCKNN, weighted"])
def test_gradients_reach_the_tokens(name):
    """Each token that a new one is made of, which for K-Medoids are the medoids alone."""
    reducer = make(name, layers=(1,), knob={"ToMe": 3, "LoTM": 3, "DHTMPlus": 3}.get(name))
    reducer.attach(6, 1, (3, 4), (1,))
    tokens = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    attention = Attention(1, keys=torch.randn(2, 3, 12, 2), cls=torch.rand(2, 12), received=torch.rand(2, 12))
    new, regions = reducer(tokens, Regions.identity(2, (3, 4)), attention)
    new.square().sum().backward()
    n_reached = (tokens.grad.abs().amax(dim=2) > 0).sum(1)
    assert (n_reached == (regions.n_tokens if name == "KMedoids" else 12)).all()


@pytest.mark.parametrize("name", [*METHODS, "DPCKNN, weighted"])
def test_parameters_are_saved_and_loaded_with_the_model(name):
    model = small()
    plain = set(model.state_dict())
    shaken(dhtm.patch(model, make(name)))
    state, expected = model.state_dict(), logits(model, images_for(model))
    assert set(state) - plain == {f"reducer.{key}" for key in NETWORKS.get(name, ())}
    other = dhtm.patch(small(), make(name))
    other.load_state_dict(state)
    assert torch.equal(logits(other, images_for(other)), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_learned_goes_along_to_another_model_of_the_same_shape_only(name):
    model = shaken(dhtm.patch(small(), make(name)))
    images = images_for(model)
    expected, reducer = logits(model, images), model.reducer
    learned = {key: value.clone() for key, value in reducer.state_dict().items()}
    dhtm.unpatch(model)
    other = dhtm.patch(small(), reducer)
    assert torch.equal(logits(other, images), expected)
    assert all(torch.equal(value, learned[key]) for key, value in reducer.state_dict().items())
    dhtm.unpatch(other)
    wider = small(embed_dim=96)
    with pytest.raises(ValueError, match="another shape"):
        dhtm.patch(wider, reducer)
    assert not hasattr(wider, "reduction")


@pytest.mark.parametrize("name", KEEP_RATE)
@pytest.mark.parametrize("keep_rate", [0, -1, 1.5, float("nan"), "0.5"])
def test_keep_rates_are_above_0_and_at_most_1(name, keep_rate):
    with pytest.raises(ValueError, match="keep_rate="):
        METHODS[name](keep_rate)


@pytest.mark.parametrize("name", KEEP_RATE)
def test_keep_rates_of_all_or_nothing(name):
    model = small()
    images = images_for(model)
    plain = logits(model, images)
    kept = logits(shaken(dhtm.patch(model, make(name, 1))), images)
    assert tokens_by_layer(model) == [49] * 5 and kept.isfinite().all()
    if name in ("KMedoids", "DPCKNN", "ATC"):  # each token is its own cluster
        torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4)
    dhtm.unpatch(model)
    with pytest.raises(ValueError, match=r"keep_rate=0.05 leaves no token in layer 4"):
        dhtm.patch(model, make(name, 0.05))
    assert not hasattr(model, "reduction")


@pytest.mark.parametrize(("grid", "keep_rate", "left"), [((10, 10), 0.29, [29, 8]), ((10, 10), 0.7, [70, 49])])
def test_keep_rates_are_exact_where_floating_point_is_not(grid, keep_rate, left):
    reducer = KMedoids(keep_rate, layers=(2, 4))
    assert [reducer.tokens_after(100, layer, grid) for layer in (2, 4)] == left


@pytest.mark.parametrize("name", LEARNED)
def test_more_clusters_than_tokens_are_refused(name):
    model = dhtm.patch(build("dynamic size"), make(name, 0.5))
    logits(model, torch.randn(1, 3, 256, 192))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [192, 98, 98, 49, 49]
    with pytest.raises(ValueError, match="98 clusters in layer 2, but only N=60 tokens"):
        logits(model, torch.randn(1, 3, 160, 96))


@pytest.mark.parametrize("name", ["KMedoids", "DPCKNN", "TokenMergence", "ATC"])
def test_clusters_follow_the_image_size(name):
    model = dhtm.patch(build("dynamic size"), make(name, 0.5))
    logits(model, torch.randn(1, 3, 160, 96))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [60, 30, 30, 15, 15]


@pytest.mark.parametrize("name", ["KMedoids", "TokenMergence"])
@pytest.mark.parametrize("layers", [(1, 3), "all"])
def test_attention_of_the_layer_before_the_first_is_not_there(name, layers):
    model = small()
    with pytest.raises(ValueError, match=f"{name} reads the attention of the layer before, so it starts from 2"):
        dhtm.patch(model, make(name, 0.9, layers))
    assert not hasattr(model, "reduction")


@pytest.mark.parametrize(("name", "n_tokens", "needed_for_sizes"), [("PatchMerger", 4, 2), ("ToMe", 15, 0)])
def test_lazy_regions_are_computed_once_when_asked_for(monkeypatch, name, n_tokens, needed_for_sizes):
    """They serve nothing but their reader, and a forward pass computes none of them."""
    calls = []
    merge = Regions.merge
    monkeypatch.setattr(Regions, "merge", lambda *arguments: calls.append(1) or merge(*arguments))
    model = dhtm.patch(small(), make(name))
    logits(model, images_for(model))
    regions = dhtm.regions(model)
    assert regions.n_tokens == n_tokens and isinstance(regions, Regions) and not calls
    assert (regions.sizes.sum(1) == 49).all() and len(calls) == needed_for_sizes
    assert regions.assignment.max() < n_tokens and len(calls) == 2  # one for each of the two layers
    assert regions.assignment.max() < n_tokens and len(calls) == 2


def test_highest_takes_the_first_among_equals():
    values = torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]])
    assert highest(values, 3).tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 200), m=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
def test_highest_is_a_stable_sort(n, m, seed):
    values = np.random.default_rng(seed).integers(0, 5, (2, n))
    expected = [sorted(range(n), key=lambda i: (-image[i], i))[:m] for image in values]
    assert highest(torch.tensor(values, dtype=torch.float32), m).tolist() == expected


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_squared_distances(dtype, accuracy):
    """Also of tokens that share a large part, whose squares take up the digits of the difference."""
    rng = torch.Generator().manual_seed(0)
    for offset in (0, 100):
        tokens = (torch.randn(2, 40, 33, generator=rng, dtype=torch.float64) + offset).to(dtype)
        tokens[:, 20:] = tokens[:, :20]  # duplicates, which rounding could bring below 0
        distances = squared_distances(tokens)
        assert distances.dtype == torch.promote_types(dtype, torch.float32)
        assert (distances >= 0).all() and not distances.diagonal(dim1=1, dim2=2).any()
        for image, got in zip(tokens.double(), distances, strict=True):
            np.testing.assert_allclose(got, cdist(image, image, "sqeuclidean"), rtol=accuracy, atol=accuracy)


def test_squared_distances_are_as_wide_under_autocast():
    tokens = torch.randn(1, 40, 33, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = squared_distances(tokens)
    torch.testing.assert_close(got, squared_distances(tokens))
