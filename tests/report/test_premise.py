"""The premise: similarity over SciPy's distances on the grid, the merge of one pair, and statistics of regions."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist

from dhtm.harness.core.errors import UserError
from dhtm.harness.data.scenes import Digits
from dhtm.harness.locality import OnePair, Premise, SimilarityProbe, measure, region_statistics
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import UNMERGED, Method
from dhtm.reducer import Attention
from dhtm.regions import Regions

GRID = (14, 14)
PATCHES = np.argwhere(np.ones(GRID))  # rows and columns
DISTANCES = cdist(PATCHES, PATCHES, "chebyshev")


def reduce(reducer, tokens, ids=None):
    """Run a reducer in layer 2 on tokens [B, 196, D]; return the new tokens and regions."""
    reducer.image_ids = ids
    return reducer(tokens, Regions.identity(len(tokens), GRID), Attention(layer=2))


def test_similarity_is_the_mean_over_all_pairs_at_a_distance():
    tokens, probe = torch.randn(2, 196, 8), SimilarityProbe()
    assert reduce(probe, tokens)[0] is tokens
    unit = (tokens / tokens.norm(dim=-1, keepdim=True)).double().numpy()
    for distance in (1, 6, 13):
        expected = [(image @ image.T)[distance == DISTANCES].mean() for image in unit]
        assert probe.similarity[2][:, distance - 1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["most similar", "random"])
def test_one_pair_at_the_distance_is_merged_into_its_average(mode):
    tokens = torch.randn(3, 196, 8)
    new_tokens, regions = reduce(OnePair(2, 5, mode, seed=1), tokens, torch.tensor([7, 8, 9]))
    for image, new, assignment in zip(tokens, new_tokens, regions.assignment, strict=True):
        (token,) = torch.nonzero(assignment.bincount() == 2).flatten().tolist()
        p, q = torch.nonzero(assignment == token).flatten().tolist()
        assert DISTANCES[p, q] == 5
        if mode == "most similar":
            unit = torch.nn.functional.normalize(image, dim=-1)
            similarity = (unit @ unit.T).masked_fill(torch.tensor(DISTANCES != 5), -2)
            assert similarity[p, q] == pytest.approx(similarity.max().item(), abs=1e-6)
        expected = image.clone()
        expected[[p, q]] = (image[p] + image[q]) / 2
        assert torch.equal(new[assignment], expected)
        assert torch.equal(new, expected[[i for i in range(196) if i != q]])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"distances": [1, 14]}, r"distances=\[1, 14\]: in a grid of 14×14 none is above 13"),
        ({"layer": 13}, "layer=13: deit_micro has layers 1 to 12"),
        ({}, "method=unmerged: it merges nothing"),
        (
            {"methods": {"sit": Method("sit", "baselines.SiT", checkpoint="trained")}},
            "method=sit: it needs weights trained",
        ),
    ],
)
def test_user_errors_name_the_setting(setting, message):
    setting = {"methods": {"unmerged": UNMERGED}, **setting}
    with pytest.raises(UserError, match=message):
        measure(Premise(Backbone("deit_micro", "deit_micro", 10), Digits(limit=2), **setting))


def test_random_pairs_depend_only_on_the_image_and_the_seed():
    def assignments_of(ids, seed=0):
        return reduce(OnePair(2, 3, "random", seed), torch.zeros(len(ids), 196, 8), torch.tensor(ids))[1].assignment

    assignments = assignments_of([4, 5])
    assert torch.equal(assignments[1:], assignments_of([5])) and not torch.equal(assignments[0], assignments[1])
    assert not torch.equal(assignments, assignments_of([4, 5], seed=1))


def test_region_statistics_are_those_computed_by_hand():
    assignment = torch.tensor([[0, 0, 1, 2, 3, 1, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 6, 6]])  # 3×3 patches, 7 tokens
    sizes = torch.stack([row.bincount(minlength=7) for row in assignment])
    statistics = region_statistics(Regions(assignment, sizes, (3, 3)))
    assert statistics["distance"].tolist() == pytest.approx([1, 4 / 3])
    assert statistics["adjacent_pct"].tolist() == pytest.approx([100, 200 / 3])
    assert statistics["largest"].tolist() == [2, 3]
    assert statistics["merged_pct"].tolist() == pytest.approx([400 / 9, 300 / 9])
    assert statistics["pieces"].tolist() == [1, 1]
    disconnected = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0]])
    statistics = region_statistics(Regions(disconnected, disconnected[0].bincount()[None], (3, 3)))
    assert statistics["pieces"].tolist() == [9 / 8] and statistics["distance"].tolist() == [2]


def test_script_writes_a_table_and_a_figure_and_prints_a_summary(script, tmp_path):
    overrides = ["data.limit=12", "n_images=6", "method=dhtm,tome", "target.reduction_pct=null", "distances=[1,13]"]
    result = script("premise", *overrides, "device=cpu", f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    data = pd.read_csv(tmp_path / "premise.csv")
    assert data.groupby("part").size().to_dict() == {"similarity": 12 * 13, "regions": 2 * 5, "one_merge": 4}
    assert (data.n_images == 6).all()
    assert (data.low <= data["mean"]).all() and (data["mean"] <= data.high).all()
    pieces = data[data.quantity == "pieces"].set_index("method")["mean"]
    assert pieces["dhtm"] == 1 <= pieces["tome"], "DHTM's tokens are connected regions"
    assert "Neighbours are more similar than the most distant patches in" in result.stdout
    assert (tmp_path / "premise.png").stat().st_size > 20_000
