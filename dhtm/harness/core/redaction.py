"""What must not be written down: passwords and tokens that came in with a config or an error message."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|secret)_?key)$", re.IGNORECASE)
_SECRETS = [
    (re.compile(r"(\w+://)[^/\s@]+@"), rf"\1{HIDDEN}@"),  # user:password@ of a URL
    (re.compile(r"(\w+://[^\s?]+\?)[^\s'\"]+"), rf"\1{HIDDEN}"),  # its query, where signatures are
    (re.compile(r"(authorization:\s*\w+\s+)[^\s'\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # of a `pipe:curl -H ...`
    (re.compile(r"\b((hf|ghp)_[A-Za-z0-9]{16,}|wandb_v\d_\w{16,})"), HIDDEN),
]


def redacted(text: str) -> str:
    """A text with "***" for what looks like a password or a token: credentials and queries of URLs, known forms of keys."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted_config(config: DictConfig) -> dict:
    """A resolved config with "***" for secrets: the values of keys named token, password and so on, and those in texts."""
    return _redacted(OmegaConf.to_container(config, resolve=True))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        hide = lambda key, item: isinstance(item, str) and _SECRET_KEY.search(str(key))  # noqa: E731
        return {key: HIDDEN if hide(key, item) else _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
