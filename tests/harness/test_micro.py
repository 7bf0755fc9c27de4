"""Training the embedded model: a few steps of the real thing."""

from dhtm.harness import config
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.training.embedded import train_embedded

SHORT = (
    "stages=[{steps: 3, batch_size: 8, window: 8, difficulty: [0, 0.5]}, "
    "{steps: 2, batch_size: 4, window: 14, difficulty: [1, 1]}]"
)


def test_training_writes_weights_that_the_runner_loads(composed, tmp_path):
    file = tmp_path / "new/micro.safetensors"
    settings = composed(SHORT, "data.limit=20", f"output={file}", config_name="train_micro")
    assert 0 <= config.call(train_embedded, settings) <= 100
    model = Backbone("deit_micro", "deit_micro", 10, file).load()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    first = file.read_bytes()
    config.call(train_embedded, settings)
    assert file.read_bytes() == first, "a seed fixes the training"
