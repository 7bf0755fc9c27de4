"""Checkpoints of a training: everything needed to resume it, and the settings that must be the same."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhtm.harness.core.errors import UserError, explain
from dhtm.harness.core.files import write_atomically
from dhtm.harness.core.ranks import Ranks


def write_checkpoint(
    file: Path, parts: dict[str, Any], history: list[dict], log_id: str, random_states: list, settings: dict[str, str]
) -> None:
    """Write a checkpoint atomically.

    Args:
        parts: model, optimiser, schedule and scaler.
        history: one row per finished epoch.
        log_id: the training's name in a tracker.
        random_states: of every rank, from :func:`random_state`.
        settings: what the result depends on, as strings.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "log_id": log_id, "random": random_states, "config": settings}
    write_atomically(file, lambda path: torch.save(state, path))


def read_checkpoint(
    file: Path, parts: dict[str, Any], settings: dict[str, str], ranks: Ranks
) -> tuple[list[dict], str]:
    """Restore everything from a checkpoint.

    Returns:
        The history, and the training's name in a tracker.

    Raises:
        UserError: the checkpoint is damaged, or from a training with other settings.
    """
    with explain(f"{file}: damaged", remedy="; remove it, or start again with force=true"):
        state = torch.load(file, map_location="cpu", weights_only=True)
        before, history, log_id, random_states = (state[key] for key in ("config", "history", "log_id", "random"))
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"{file}: started with {key}={before.get(key)}, not {key}={value}; set another output=DIR, or force=true to "
                "start again"
            )
    with explain(f"{file}: does not fit this version of the code", remedy="; start again with force=true"):
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _set_random_state(random_states[ranks.rank % len(random_states)], ranks.device)
    return history, log_id


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that augmentation, mixup and dropout draw from."""
    name, keys, *position = np.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(), "numpy": [name, keys.tolist(), *position], "torch": torch.get_rng_state(), "cuda": cuda,
    }  # fmt: skip


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
