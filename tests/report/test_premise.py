"""The premise: similarity by distance, what regions look like, and what one merge costs, each against a plain loop."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch

import dhtm
from dhtm.harness.locality import OnePair, SimilarityProbe, grid_distances, region_statistics
from dhtm.regions import Regions
from dhtm.vit import image_ids

GRID = (14, 14)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("deit_micro", depth=3).eval()


@torch.inference_mode()
def tokens_after_attention(model, images, layer):
    """Patch tokens [B, N, D] after the attention of a layer, by timm's own parts."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks[: layer - 1]:
        x = block(x)
    block = model.blocks[layer - 1]
    return x + block.attn(block.norm1(x))


def far(p, q):
    return max(abs(p // 14 - q // 14), abs(p % 14 - q % 14))


def test_similarity_is_the_mean_over_all_pairs_at_a_distance(model):
    images = torch.randn(2, 1, 56, 56)
    probe = SimilarityProbe()
    with torch.inference_mode():
        dhtm.patch(model, probe)(images)
    dhtm.unpatch(model)
    tokens = tokens_after_attention(model, images, 2)[:, 1:].double().numpy()
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    for distance in (1, 6, 13):
        pairs = [(p, q) for p in range(196) for q in range(196) if far(p, q) == distance]
        expected = [np.mean([image[p] @ image[q] for p, q in pairs]) for image in unit]
        assert probe.similarity[2][:, distance - 1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["most similar", "random"])
def test_one_pair_at_the_distance_is_merged_and_costs_what_a_plain_forward_says(model, mode):
    images = torch.randn(3, 1, 56, 56)
    with torch.inference_mode(), image_ids(dhtm.patch(model, OnePair(2, 5, mode, seed=1)), torch.tensor([7, 8, 9])):
        logits = model(images)
    found = dhtm.regions(model)
    dhtm.unpatch(model)
    x = tokens_after_attention(model, images, 2)
    rows = []
    for image, assignment in zip(x, found.assignment, strict=True):
        (token,) = torch.nonzero(assignment.bincount() == 2).flatten().tolist()
        p, q = torch.nonzero(assignment == token).flatten().tolist()
        assert far(p, q) == 5
        patches = image[1:].clone()
        if mode == "most similar":
            unit = torch.nn.functional.normalize(patches, dim=-1)
            similarity = (unit @ unit.T).masked_fill(grid_distances(GRID) != 5, -2)
            assert similarity[p, q] == pytest.approx(similarity.max().item(), abs=1e-6)
        patches[p] = (patches[p] + patches[q]) / 2
        rows.append(torch.cat([image[:1], patches[[i for i in range(196) if i != q]]]))
    with torch.inference_mode():
        x = torch.stack(rows)
        x = x + model.blocks[1].mlp(model.blocks[1].norm2(x))
        expected = model.forward_head(model.norm(model.blocks[2](x)))
    assert torch.allclose(logits, expected, atol=1e-5)


def test_random_pairs_depend_on_the_image_and_the_seed_alone(model):
    def drawn(ids, seed=0):
        dhtm.patch(model, OnePair(2, 3, "random", seed))
        with torch.inference_mode(), image_ids(model, torch.tensor(ids)):
            model(torch.zeros(len(ids), 1, 56, 56))
        found = dhtm.regions(model).assignment
        dhtm.unpatch(model)
        return found

    both = drawn([4, 5])
    assert torch.equal(both[1:], drawn([5])) and not torch.equal(both[0], both[1])
    assert not torch.equal(both, drawn([4, 5], seed=1))


def test_statistics_of_regions_by_hand():
    assignment = torch.tensor([[0, 0, 1, 2, 3, 1, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 6, 6]])  # 3×3 patches, 7 tokens
    sizes = torch.stack([row.bincount(minlength=7) for row in assignment])
    found = region_statistics(Regions(assignment, sizes, (3, 3)))
    assert found["distance"].tolist() == pytest.approx([1, 4 / 3])
    assert found["adjacent_pct"].tolist() == pytest.approx([100, 200 / 3])
    assert found["largest"].tolist() == [2, 3]
    assert found["merged_pct"].tolist() == pytest.approx([400 / 9, 300 / 9])
    assert found["pieces"].tolist() == [1, 1]
    apart = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0]])
    found = region_statistics(Regions(apart, apart[0].bincount()[None], (3, 3)))
    assert found["pieces"].tolist() == [9 / 8] and found["distance"].tolist() == [2]


def test_the_script_writes_numbers_and_words(script, tmp_path):
    small = ["data.limit=12", "n_images=6", "methods=[dhtm,tome]", "target.reduction_pct=null", "distances=[1,13]"]
    result = script("premise", *small, "device=cpu", f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    data = pd.read_csv(tmp_path / "premise.csv")
    assert data.groupby("part").size().to_dict() == {"similarity": 12 * 13, "regions": 2 * 5, "one_merge": 4}
    assert (data.n_images == 6).all()
    assert (data.low <= data["mean"]).all() and (data["mean"] <= data.high).all()
    pieces = data[data.quantity == "pieces"].set_index("method")["mean"]
    assert pieces["dhtm"] == 1 <= pieces["tome"], "DHTM's tokens are connected regions"
    assert "Neighbours are more similar than the most distant patches in" in result.stdout
    assert (tmp_path / "premise.png").stat().st_size > 20_000
