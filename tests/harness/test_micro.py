"""Training the embedded model: a few steps of the real thing."""

import numpy as np
import pytest
import torch

from dhtm.harness.core.errors import UserError
from dhtm.harness.models.backbones import load_backbone
from dhtm.harness.training.embedded import KeepTokens, SceneBatches, Stage, train_micro

SHORT = (
    "stages=[{steps: 3, batch_size: 8, window: 8, difficulty: [0, 0.5]}, "
    "{steps: 2, batch_size: 4, window: 14, difficulty: [1, 1]}]"
)


def test_training_writes_weights_that_the_runner_loads(composed, tmp_path):
    options = [SHORT, "data.limit=20", f"output={tmp_path}/new/micro.safetensors"]
    top1 = train_micro(composed(*options, config_name="train_micro"))
    assert 0 <= top1 <= 100
    model = load_backbone("deit_micro", str(tmp_path / "new/micro.safetensors"), 10)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    first = (tmp_path / "new/micro.safetensors").read_bytes()
    train_micro(composed(*options, config_name="train_micro"))
    assert (tmp_path / "new/micro.safetensors").read_bytes() == first, "a seed fixes the training"


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


def test_a_loss_that_is_not_finite_stops_the_training(composed, tmp_path):
    config = composed(
        SHORT, "lr=1e30", "warmup_steps=0", f"output={tmp_path}/micro.safetensors", config_name="train_micro"
    )
    with (
        np.errstate(all="ignore"),
        pytest.raises(UserError, match=r"the loss is .* nothing is saved; try a smaller lr="),
    ):
        train_micro(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output=/proc/nowhere/micro.safetensors", "output=/proc/nowhere/micro.safetensors: cannot write there"),
        ("backbone=deit_tiny", "backbone=deit_tiny: it does not take grey images of 56×56; deit_micro does"),
    ],
)
def test_what_cannot_end_well_is_not_begun(composed, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train_micro(composed(f"output={tmp_path}/micro.safetensors", override, config_name="train_micro"))


def test_only_the_digits_can_be_trained_on(composed):
    with pytest.raises(UserError, match="data=imagenet: training draws its own scenes"):
        train_micro(composed("data=imagenet", config_name="train_micro"))
