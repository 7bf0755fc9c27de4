"""Passwords and tokens are not written down."""

import pytest
from omegaconf import OmegaConf

from dhtm.harness.core.errors import UserError
from dhtm.harness.core.redaction import redacted, redacted_config
from dhtm.harness.runs.store import VARIABLES, environment


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:word@bucket/val.tar", "s3://***@bucket/val.tar"),
        ("'https://host/a.tar?X-Amz-Signature=1f&y=2' is", "'https://host/a.tar?***' is"),
        ("pipe:curl -H 'Authorization: Bearer abc.def' https://host/a", "pipe:curl -H 'Authorization: Bearer ***' https://host/a"),
        ("hf_0123456789abcdefghij", "***"),
    ],
)  # fmt: skip
def test_secrets_in_texts_are_hidden(text, shown):
    assert redacted(text) == shown
    assert str(UserError(f"data.root={text}: no")) == f"data.root={shown}: no"


@pytest.mark.parametrize(
    "text",
    [
        "/home/me/imagenet",
        "~/a@b/c",
        "data.root is not set?",
        "token_mergence",
        "hf_hub_download_of_files",
        "basic form",
    ],
)
def test_other_texts_stay(text):
    assert redacted(text) == text


def test_configs_are_hidden_by_key_and_by_value():
    config = OmegaConf.create(
        {"data": {"hub_token": "x", "root": ["a://u:p@h", 3]}, "api_key": None, "features": "tokens", "password": "y"}
    )
    assert redacted_config(config) == {
        "data": {"hub_token": "***", "root": ["a://***@h", 3]}, "api_key": None, "features": "tokens", "password": "***",
    }  # fmt: skip


def test_only_listed_variables_are_noted(monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "word")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    noted = environment()["variables"]
    assert noted["OMP_NUM_THREADS"] == "3"
    assert set(noted) <= set(VARIABLES)
    assert not [name for name in VARIABLES if "KEY" in name or "TOKEN" in name]
