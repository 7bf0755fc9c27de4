"""Training the embedded model: a few steps of the real thing."""

import pytest
import torch

from dhtm.harness import config
from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.training.embedded import KeepTokens, SceneBatches, Stage, train_embedded

SHORT = (
    "stages=[{steps: 3, batch_size: 8, window: 8, difficulty: [0, 0.5]}, "
    "{steps: 2, batch_size: 4, window: 14, difficulty: [1, 1]}]"
)


@pytest.fixture
def train(composed, tmp_path):
    """Train for a few steps, in this process; the weights go to a folder of the test's own."""

    def train_with(*overrides):
        options = [SHORT, "data.limit=20", f"output={tmp_path}/new/micro.safetensors", *overrides]
        return train_embedded(config.embedded_training(composed(*options, config_name="train_micro")))

    return train_with


def test_training_writes_weights_that_the_runner_loads(train, tmp_path):
    assert 0 <= train() <= 100
    file = tmp_path / "new/micro.safetensors"
    model = Backbone("deit_micro", "deit_micro", 10, file).load()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    first = file.read_bytes()
    train()
    assert file.read_bytes() == first, "a seed fixes the training"


def test_the_window_holds_nearly_all_of_the_digit():
    batches = SceneBatches(Stage(10, 16, 8, (0.0, 0.0)), first_scene=0, side=14, seed=0)
    for step in (0, 9):
        images, _, kept = batches[step]
        assert images.shape == (16, 56, 56)
        assert kept.shape == (16, 64)
        ink = images.float().unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4)).flatten(1)
        assert (ink.gather(1, kept).sum(1) > 0.85 * ink.sum(1)).all()
    assert (batches[0][0].numpy() != batches[1][0].numpy()).any()


def test_kept_tokens_are_those_asked_for():
    module = KeepTokens(1)
    module.kept = torch.tensor([[2, 0], [1, 1]])
    x = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    assert module(x)[..., 0].tolist() == [[0, 3, 1], [4, 6, 6]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=/proc/nowhere/micro.safetensors", "output=/proc/nowhere/micro.safetensors: cannot write there"),
        ("data=imagenet", "data=.*: Input should be a dictionary or an instance of Digits"),
        ("stages=[]", r"stages=\[\]: List should have at least 1 item"),
        (
            "stages=[{steps: 0, batch_size: 8, window: 8, difficulty: [0, 1]}]",
            "stages.steps=0: Input should be greater",
        ),
    ],
)
def test_what_cannot_end_well_is_refused_at_once(train, override, message):
    with pytest.raises(UserError, match=message):
        train(override)
