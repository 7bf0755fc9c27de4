"""Find, read, check and write weights that were trained with a method."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dhtm.harness.core.errors import UnavailableError, UserError, explain
from dhtm.harness.core.files import PROJECT, write_atomically
from dhtm.harness.models.backbones import Backbone
from dhtm.harness.models.methods import Method

SHIPPED = ("embedded", "imagenette")  # folders of results/ with weights


def load_model(
    backbone: Backbone, method: Method, checkpoints_dir: Path, allow_untrained: bool = False, seed: int = 0
) -> tuple[VisionTransformer, Path | None]:
    """Return a backbone patched with a method, off-the-shelf or with weights that were trained with the method.

    Args:
        backbone, method: what to load; ``method.checkpoint`` chooses the weights.
        checkpoints_dir: where :mod:`dhtm.harness.training` puts weights; searched before the shipped ones.
        allow_untrained: run a method with learned parameters without trained weights.
        seed: for parameters that are not trained.

    Returns:
        The model, and the file of the trained weights; None if it is off-the-shelf.

    Raises:
        UnavailableError: there are no trained weights.
        UserError: the weights cannot be read, belong to something else, or are needed and not given.
    """
    file = _find(backbone, method, checkpoints_dir, allow_untrained)
    unpatched = backbone.load() if file is None else backbone.bare()
    torch.manual_seed(seed)  # after loading, which may draw numbers
    model = method.put_into(unpatched, backbone.name)
    if file is None:
        if any(True for _ in model.reducer.parameters()) and not allow_untrained:
            raise UserError(
                f"method={method.name} has parameters of its own and method.checkpoint=null gives none: set "
                "method.checkpoint=trained or a file, or allow_untrained=true to run it with random ones"
            )
        return model, None
    source = f"method.checkpoint={file}"
    with explain(f"{source}: not weights of scripts/train.py, or damaged"), safe_open(file, "pt") as content:
        state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        about = content.metadata() or {}
    for key, wanted in _identity(backbone, method).items():
        if about.get(key) != wanted:
            raise UserError(f"{source}: trained with {key}={about.get(key)}, not {key}={wanted}")
    if method.checkpoint == "trained" and about.get("epoch") != about.get("epochs"):
        raise UserError(
            f"{file}: trained for {about.get('epoch')} of {about.get('epochs')} epochs so far; resume it by the command that "
            f"started it, or take the weights as they are, method.checkpoint={file}"
        )
    with explain(f"{source}: not the weights of {backbone.name} with {method.name}"):
        model.load_state_dict(state)
    return model, file


def save_weights(
    model: nn.Module, backbone: Backbone, method: Method, dtype: torch.dtype, history: dict[str, object], file: Path
) -> None:
    """Write a patched model's parameters atomically, with the backbone, method and options that they belong to.

    Args:
        dtype: of the parameters in the file.
        history: how they were trained: epoch (how many are finished), epochs (how many are planned), init, data.
    """
    write_parameters(
        model, dtype, file, _identity(backbone, method) | {key: str(value) for key, value in history.items()}
    )


def write_parameters(model: nn.Module, dtype: torch.dtype, file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a model's parameters and buffers in safetensors' format, atomically."""
    state = {key: value.to("cpu", dtype).contiguous() for key, value in model.state_dict().items()}
    # safetensors' save_file would make a file that only its owner may read.
    write_atomically(file, lambda path: path.write_bytes(save(state, metadata)))


def _identity(backbone: Backbone, method: Method) -> dict[str, str]:
    """Return what trained weights belong to, as strings: backbone, method, layers and every option that changes the result."""
    options = {key: value for key, value in method.knobs.items() if key not in ("backend", "seed")}
    named = {"backbone": backbone.architecture, "num_classes": backbone.num_classes, "method": method.name}
    about = {**named, "layers": method.options["layers"], **options}
    return {key: json.dumps(value).strip('"') for key, value in about.items()}


def _find(backbone: Backbone, method: Method, checkpoints_dir: Path, allow_untrained: bool) -> Path | None:
    """Return the file of weights that a method asks for; None for the backbone's own."""
    if method.checkpoint is None:
        return None
    if method.checkpoint != "trained":
        return Path(method.checkpoint)
    name = backbone.name / method.place
    own = checkpoints_dir / name / "last.safetensors"
    for file in (own, *(PROJECT / "results" / folder / "weights" / f"{name}.safetensors" for folder in SHIPPED)):
        if file.is_file():
            return file
    if allow_untrained:
        return None
    raise UnavailableError(
        f"method={method.name}: no weights trained for {name.name} in {backbone.name} ({own} does not exist); train them by "
        "scripts/train.py with the same backbone and method, give a file, method.checkpoint=FILE, or run the method untrained, "
        "allow_untrained=true"
    )
