"""Every token reduction method in a model, and functions that the methods share."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from networks import METHODS, MODELS, ROTARY, build, images_for, logits, randomise_reducer
from scipy.spatial.distance import cdist

import dhtm
from baselines import ATC, DPCKNN, KMedoids, LoTM, PatchMerger, PiToMe, RandomMerge, Sinkhorn, TokenMergence, ToMe
from dhtm import Regions
from dhtm.reducer import Attention, squared_distances
from dhtm.vit import image_ids, patch_grid, tokens_by_layer

MERGING = ("ToMe", "LoTM", "RandomMerge", "DHTM", "DHTM, all pairs", "DHTMPlus")  # 20 merges per layer
NETWORKS = {  # parameters in the state dict with layers=(2, 4)
    "PatchMerger": {f"stages.{layer}.{name}" for layer in (2, 4) for name in ("norm.weight", "norm.bias", "queries")},
    "Sinkhorn": {f"stages.{layer}.centres" for layer in (2, 4)},
    "SiT": {f"stages.{layer}.scale" for layer in (2, 4)}
    | {f"stages.{layer}.mlp.{i}.{kind}" for layer in (2, 4) for i in (0, 1, 3) for kind in ("weight", "bias")},
    "TokenMergence": {f"views.{scale}.{kind}" for scale in (2, 4) for kind in ("weight", "bias")},
    "DPCKNN, weighted": {f"scores.{layer}.{kind}" for layer in (2, 4) for kind in ("weight", "bias")},
}
# Every method in one model, one method in every model, and one before the block in a model with rotary embeddings.
WIDE = "224x336"
IN_MODELS = [(name, WIDE) for name in METHODS] + [("DHTM", model) for model in MODELS | ROTARY if model != WIDE]
IN_MODELS += [("PatchMerger", "rope, mixed axes for each head")]


def make(name, layers=(2, 4)):
    return METHODS[name](layers=layers)


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("name", "model_name"), IN_MODELS)
def test_method_reduces_tokens_and_unpatch_restores_the_model(name, model_name):
    model, lengths = build(model_name), []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, x: lengths.append(x.shape[1] - model.num_prefix_tokens))
    images, ids = images_for(model, batch=6), torch.arange(100, 106)
    plain, hooks, types = logits(model, images), n_hooks(model), [type(block) for block in model.blocks]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert dhtm.patch(model, make(name)) is model
    lengths.clear()
    with image_ids(randomise_reducer(model), ids):
        reduced, regions = logits(model, images), dhtm.regions(model)
    assert reduced.shape == plain.shape and reduced.isfinite().all()
    assert (reduced != plain).any(dim=1).all()

    n_patches = math.prod(patch_grid(model))
    if name == "PiToMe":
        first = n_patches - math.floor(n_patches - n_patches * 0.9)
        second = first - math.floor(first - first * 0.9)
    elif name in MERGING:
        first, second = n_patches - 20, n_patches - 40
    else:
        first, second = (math.floor(n_patches * Fraction(3, 10) ** i) for i in (1, 2))
    assert lengths == tokens_by_layer(model) == [n_patches, first, first, second, second]
    assert model.reducer.n_prefix == model.num_prefix_tokens
    for layer, n_tokens in enumerate(lengths, start=1):
        of_layer = dhtm.regions(model, layer)
        counts = torch.stack([image.bincount(minlength=n_tokens) for image in of_layer.assignment])
        assert (
            torch.equal(of_layer.sizes, counts) and of_layer.n_tokens == n_tokens and of_layer.grid == patch_grid(model)
        )

    for i in (0, 3):  # the same for one image alone, the second time with unfused attention
        with image_ids(model, ids[i : i + 1]):
            torch.testing.assert_close(logits(model, images[i : i + 1]), reduced[i : i + 1], rtol=1e-4, atol=1e-4)
        assert torch.equal(dhtm.regions(model).assignment[0], regions.assignment[i])
        for block in model.blocks:
            block.attn.fused_attn = not block.attn.fused_attn

    dhtm.unpatch(model)
    assert torch.equal(logits(model, images), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(model.state_dict()) == set(state) and not hasattr(model, "reduction")
    assert n_hooks(model) == hooks and [type(block) for block in model.blocks] == types


NO_MERGES = {dhtm.DHTMPlus: 0, ToMe: 0, LoTM: 0, RandomMerge: 0, PiToMe: 1, ATC: 1, KMedoids: 1, DPCKNN: 1}  # knobs
NO_MERGES = [(method(knob, layers=(2, 4)), "deit_tiny") for method, knob in NO_MERGES.items()]
NO_MERGES += [(dhtm.DHTM(k=0, layers="all"), model) for model in MODELS | ROTARY]


@pytest.mark.parametrize(("reducer", "model_name"), NO_MERGES)
def test_method_that_merges_nothing_does_not_change_the_logits(reducer, model_name):
    model = build(model_name)
    plain, got = logits(model, images_for(model)), logits(dhtm.patch(model, reducer), images_for(model))
    if isinstance(reducer, (KMedoids, DPCKNN)):  # they compute the average of each token alone
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, plain)


@pytest.mark.parametrize(
    ("name", "model_name", "dtype"),
    [(name, "112", torch.bfloat16) for name in METHODS]
    + [("DHTM", model, torch.bfloat16) for model in ("dinov3", "rope, mixed axes for each head", "naflex, axial")]
    + [("DHTM", "112", torch.float16)],
)
def test_half_precision_gives_similar_logits(name, model_name, dtype):
    model = build(model_name)
    images = images_for(model)
    full = logits(randomise_reducer(dhtm.patch(model, make(name))), images)
    with torch.autocast("cpu", dtype=dtype):
        autocast = logits(model, images)
    half = logits(model.to(dtype), images.to(dtype))
    assert half.dtype == dtype and (dhtm.regions(model).sizes.sum(1) == math.prod(patch_grid(model))).all()
    for result in (half, autocast):
        assert torch.nn.functional.cosine_similarity(result.float(), full).min() > 0.95


def standalone(name, grid):
    """Return a reducer without a model, and its arguments: (reducer, (tokens [2, N, 6], regions, attention))."""
    n, rng = grid[0] * grid[1], torch.Generator().manual_seed(0)
    reducer = make(name, layers=(1,))
    reducer.attach(6, 1, grid, (1,))
    tokens, keys = torch.randn(2, n, 6, generator=rng), torch.randn(2, 3, n, 2, generator=rng)
    cls, received = torch.rand(2, 2, n, generator=rng)
    return reducer, (tokens.requires_grad_(), Regions.identity(2, grid), Attention(1, keys, None, cls, received))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("PatchMerger", "Sinkhorn", "SiT")])
@torch.no_grad()
def test_autocast_does_not_change_which_tokens_merge(name):
    reducer, arguments = standalone(name, (14, 14))
    expected = reducer(*arguments)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reducer(*arguments)[1].assignment, expected.assignment)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_tokens(name):
    """All tokens contribute to a new one, except that K-Medoids keeps only the medoids."""
    reducer, (tokens, *others) = standalone(name, (6, 8))
    new, regions = reducer(tokens, *others)
    new.square().sum().backward()
    n_reached = (tokens.grad.abs().amax(dim=2) > 0).sum(1)
    assert (n_reached == (regions.n_tokens if name == "KMedoids" else 48)).all()


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_the_same_gradient_with_checkpointing(name):
    model = randomise_reducer(dhtm.patch(build("112", drop_path_rate=0.2), make(name))).train()
    images = images_for(model).requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        images.grad = None
        model(images).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()} | {"": images.grad})
    noise = 1e-9 * max(gradient.abs().max().item() for gradient in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert gradient.isfinite().all(), key
        assert gradient.any() or (key.startswith("reducer.scores") and key.endswith("bias")), key  # this bias cancels
        atol = noise + 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_transfer_to_a_model_of_the_same_shape_only(name):
    model = build("112")
    plain, images = set(model.state_dict()), images_for(model)
    state = randomise_reducer(dhtm.patch(model, make(name))).state_dict()
    expected = logits(model, images)
    assert set(state) - plain == {f"reducer.{key}" for key in NETWORKS[name]}
    loaded = dhtm.patch(build("112"), make(name))
    loaded.load_state_dict(state)
    assert torch.equal(logits(loaded, images), expected)
    reducer = model.reducer
    dhtm.unpatch(model)
    assert torch.equal(logits(dhtm.patch(build("112"), reducer), images), expected)
    with pytest.raises(ValueError, match="another shape"):
        dhtm.patch(build("112", embed_dim=96), reducer)


@pytest.mark.parametrize(
    ("method", "bare", "learned"), [(DPCKNN, {}, {"weighted": True}), (TokenMergence, {"scales": ()}, {})]
)
def test_learned_parts_have_no_effect_before_training(method, bare, learned):
    model, results = build("112"), []
    for options in (bare, learned):
        results.append(logits(dhtm.patch(model, method(0.5, layers=(2, 4), **options)), images_for(model)))
        dhtm.unpatch(model)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("method", "default"), [(dhtm.DHTM, False), (dhtm.DHTMPlus, True), (ToMe, True), (ATC, True), (PiToMe, False)]
)
def test_proportional_attention_is_by_default_as_in_the_paper(method, default):
    assert method(1).proportional_attention is default
    assert method(1, proportional_attention=not default).proportional_attention is not default


@pytest.mark.parametrize(("keep_rate", "left"), [(0.29, [29, 8]), (0.7, [70, 49])])
def test_keep_rates_are_exact_despite_floating_point(keep_rate, left):
    reducer = KMedoids(keep_rate, layers=(2, 4))
    assert [reducer.tokens_after(100, layer, (10, 10)) for layer in (2, 4)] == left


@pytest.mark.parametrize("method", [KMedoids, TokenMergence, ATC])
def test_number_of_clusters_follows_the_image_size(method):
    model = dhtm.patch(build("dynamic size"), method(0.5, layers=(2, 4)))
    logits(model, torch.randn(1, 3, 160, 96))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [60, 30, 30, 15, 15]


def test_number_of_learned_clusters_is_the_same_at_every_image_size():
    model = dhtm.patch(build("dynamic size"), PatchMerger(0.5, layers=(2, 4)))
    logits(model, torch.randn(1, 3, 256, 192))
    assert [dhtm.regions(model, layer).n_tokens for layer in range(1, 6)] == [192, 98, 98, 49, 49]
    with pytest.raises(ValueError, match="98 clusters in layer 2, but only N=60 tokens"):
        logits(model, torch.randn(1, 3, 160, 96))


@pytest.mark.parametrize(("name", "n_tokens", "needed_for_sizes"), [("PatchMerger", 4, 2), ("ToMe", 15, 0)])
def test_lazy_regions_are_computed_once_on_first_access(monkeypatch, name, n_tokens, needed_for_sizes):
    """The forward pass does not need the regions and computes none."""
    calls = []
    merge = Regions.merge
    monkeypatch.setattr(Regions, "merge", lambda *arguments: calls.append(1) or merge(*arguments))
    model = dhtm.patch(build("112"), make(name))
    logits(model, images_for(model))
    regions = dhtm.regions(model)
    assert regions.n_tokens == n_tokens and isinstance(regions, Regions) and not calls
    assert (regions.sizes.sum(1) == 49).all() and len(calls) == needed_for_sizes
    for _ in range(2):
        assert regions.assignment.max() < n_tokens and len(calls) == 2  # one for each of the two layers


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-4)])
def test_squared_distances_are_accurate(dtype, accuracy):
    """Check also tokens with a large common offset, whose squares would leave few digits for the difference."""
    rng = torch.Generator().manual_seed(0)
    for offset in (0, 100):
        tokens = (torch.randn(2, 40, 33, generator=rng, dtype=torch.float64) + offset).to(dtype)
        tokens[:, 20:] = tokens[:, :20]  # duplicates, whose distance rounding could make negative
        distances = squared_distances(tokens)
        assert distances.dtype == torch.promote_types(dtype, torch.float32)
        assert (distances >= 0).all() and not distances.diagonal(dim1=1, dim2=2).any()
        for image, got in zip(tokens.double(), distances, strict=True):
            np.testing.assert_allclose(got, cdist(image, image, "sqeuclidean"), rtol=accuracy, atol=accuracy)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (dhtm.DHTM, {"k": 60, "layers": (1, 2, 3, 4)}, "k=60 merges in layer 4, but only N=16 tokens"),
        (dhtm.DHTM, {"k": 4, "layers": (2, 7)}, r"layers=\[2, 7\]: the model has layers 1 to 5"),
        (dhtm.DHTM, {"k": 4, "layers": (3, 2)}, r"layers=\[3, 2\]: give increasing"),
        (dhtm.DHTM, {"k": 4, "layers": ()}, r"layers=\[\]: give increasing"),
        (dhtm.DHTM, {"k": -4}, "k=-4"),
        (dhtm.DHTM, {"k": 4, "features": "values"}, "features='values'"),
        (dhtm.DHTM, {}, "k=None, total=None, threshold=None: give exactly one"),
        (dhtm.DHTM, {"k": 3, "threshold": 0.5}, "give exactly one"),
        (dhtm.DHTM, {"total": 3, "inflect": 2}, "inflect=2"),
        (dhtm.DHTM, {"k": 3, "mass": "cls"}, "mass='cls': choose one of None, 'size', 'attention'"),
        (dhtm.DHTM, {"k": 3, "max_merges": 3}, "there is none"),
        (dhtm.DHTM, {"threshold": 0.5, "max_merges": -1}, "from 0"),
        (dhtm.DHTM, {"threshold": 0.5, "mass": "size"}, "no scale"),
        (dhtm.DHTM, {"threshold": [0.5, 0.6], "layers": (1, 2, 3)}, "one for each of 3 layers"),
        (dhtm.DHTM, {"threshold": "high", "layers": (1, 2, 3)}, "give one number"),
        (RandomMerge, {"k": 200, "layers": (2,)}, "k=200 merges in layer 2, but only N=196"),
        (RandomMerge, {"k": 2, "connectivity": 5}, "connectivity=5"),
        (RandomMerge, {"k": 2, "seed": "x"}, "seed='x'"),
        (RandomMerge, {"k": 2, "backend": "reference"}, "'reference': choose one of auto, torch, numba, triton"),
        (LoTM, {"k": 183, "layers": (2,)}, "k=183 merges in layer 2, .*N=196 tokens .* in 14 rows, .*at most 182"),
        (LoTM, {"k": 100, "layers": (2, 4)}, "k=100 merges in layer 4, .*N=96 tokens .* in 14 rows, .*at most 82"),
        (ToMe, {"r": 2.5}, "r=2.5"),
        (ToMe, {"r": [8, -1]}, r"r=\[8, -1\]"),
        (ToMe, {"r": 8, "inflect": 1.5}, "inflect=1.5"),
        (ToMe, {"r": [8, 8], "inflect": 0.5}, "inflect=0.5: it must be 0 where r is a list"),
        (ToMe, {"r": [59, 41], "layers": (2, 3, 4)}, r"r=\[59, 41\]: give one number for each of the 3 layers"),
        (PiToMe, {"ratio": 0.49}, "ratio=0.49"),
        (PiToMe, {"ratio": float("nan")}, "ratio=nan"),
        (PiToMe, {"ratio": "0.9"}, "ratio='0.9'"),
        (PiToMe, {"schedule": "vit"}, "schedule='vit': choose one of 'deit', 'mae'"),
        (ATC, {"keep_rate": 1.5}, "keep_rate=1.5"),
        (ATC, {"r": 8}, "keep_rate=0.9 and r=8: one of them must be a number, and the other None"),
        (ATC, {"keep_rate": None}, "keep_rate=None and r=None"),
        (ATC, {"keep_rate": None, "r": 196, "layers": (2,)}, "r=196 in layer 2, but only N=196 tokens are left there"),
        (ATC, {"linkage": "ward"}, "linkage='ward'"),
        (ATC, {"backend": "reference"}, "backend="),
        (KMedoids, {"keep_rate": 0}, "keep_rate=0"),
        (KMedoids, {"keep_rate": float("nan")}, "keep_rate=nan"),
        (KMedoids, {"keep_rate": "0.5"}, "keep_rate='0.5'"),
        (KMedoids, {"keep_rate": 0.05, "layers": (2, 4, 5)}, "keep_rate=0.05 leaves no token in layer 4"),
        (PatchMerger, {"keep_rate": 0.05, "layers": (2, 4, 5)}, "keep_rate=0.05 leaves no token in layer 4"),
        (
            KMedoids,
            {"keep_rate": 0.5, "layers": (1, 3)},
            "KMedoids reads the attention of the layer before, so it starts",
        ),
        (KMedoids, {"keep_rate": 0.5, "rounds": -1}, "rounds=-1"),
        (KMedoids, {"keep_rate": 0.5, "weights": "all"}, "weights='all': choose one of 'cls', 'received'"),
        (KMedoids, {"keep_rate": 0.5, "cost": "all"}, "cost='all': choose one of 'members', 'own'"),
        (DPCKNN, {"keep_rate": 0.5, "neighbours": 2.5}, "neighbours=2.5"),
        (Sinkhorn, {"keep_rate": 0.5, "epsilon": 0}, "epsilon=0"),
        (Sinkhorn, {"keep_rate": 0.5, "iterations": 2.5}, "iterations=2.5"),
        (TokenMergence, {"keep_rate": 0.5, "scales": (2, 1)}, r"scales=\[2, 1\]"),
    ],
)
def test_error_names_the_impossible_option(method, options, message):
    model = build("deit_tiny")
    with pytest.raises(ValueError, match=message):
        dhtm.patch(model, method(**options))
    assert not hasattr(model, "reduction")
