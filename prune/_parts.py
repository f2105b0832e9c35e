"""A pass with some of its settings changed: what a step of several does."""

from __future__ import annotations

import json
from typing import TypeVar

from compress.core.passes import Pass

_Settings = TypeVar("_Settings", bound=Pass)


def changed(settings: _Settings, **values: object) -> _Settings:
    """These settings with other values of some, checked like a recipe's."""
    return type(settings).model_validate_json(json.dumps(settings.model_dump(mode="json") | values))


def tidy(share: float) -> float:
    """A share between 0 and 1 with as many digits as a person reads, unless it needs more to be between them."""
    rounded = round(share, 6)
    return rounded if 0 < rounded < 1 else share
