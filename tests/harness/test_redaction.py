"""Passwords and tokens are not written down."""

import pytest

from dhtm.harness.core.errors import UserError
from dhtm.harness.core.redaction import redacted, redacted_settings
from dhtm.harness.runs.provenance import environment


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
    "text", ["/home/me/imagenet", "~/a@b/c", "is data.root set?", "token_mergence", "hf_hub_download_of_files", "basic form"]
)  # fmt: skip
def test_other_texts_stay(text):
    assert redacted(text) == text


def test_settings_are_hidden_by_key_and_by_value():
    settings = {
        "data": {"hub_token": "x", "root": ["a://u:p@h", 3]},
        "api_key": None,
        "features": "tokens",
        "password": "y",
    }
    hidden = {
        "data": {"hub_token": "***", "root": ["a://***@h", 3]},
        "api_key": None,
        "features": "tokens",
        "password": "***",
    }
    assert redacted_settings(settings) == hidden


def test_no_other_variables_are_recorded(monkeypatch):
    for name in ("SOME_SECRET", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "planted-word")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    recorded = environment()
    assert recorded["variables"]["OMP_NUM_THREADS"] == "3"
    assert "planted-word" not in str(recorded)
