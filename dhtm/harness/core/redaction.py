"""Hiding passwords and tokens that came in with a config or an error message."""

import re
from typing import Any

HIDDEN = "***"
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|secret)_?key)$", re.IGNORECASE)
_SECRETS = [
    (re.compile(r"(\w+://)[^/\s@]+@"), rf"\1{HIDDEN}@"),  # user:password@ in a URL
    (re.compile(r"(\w+://[^\s?]+\?)[^\s'\"]+"), rf"\1{HIDDEN}"),  # the query of a URL, which may hold a signature
    (re.compile(r"(authorization:\s*\w+\s+)[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # in `pipe:curl -H ...`
    (re.compile(r"\b((hf|ghp)_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,})"), HIDDEN),
]


def redacted(text: str) -> str:
    """Return a text with "***" for what looks like a password or token: parts of URLs and well-known forms of keys."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted_settings(value: Any) -> Any:
    """Return nested dicts and lists with "***" for the values of keys such as "token", and for secrets inside texts."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(item, str) and _SECRET_KEY.search(str(key)) else redacted_settings(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted_settings(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
