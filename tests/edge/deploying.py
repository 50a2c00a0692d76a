"""The files in `deploy/`, and their commands with the paths and ports of a test."""

from collections.abc import Mapping
from typing import Any

import yaml

from tests.house.source import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
DOCKERFILE = DEPLOY / "Dockerfile"


def composed() -> dict[str, Any]:
    """The services of compose.yaml."""
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
    return services


def replaced(text: str, replacements: Mapping[str, object]) -> str:
    """A text in which some parts, in their order, are replaced."""
    for old, new in replacements.items():
        text = text.replace(old, str(new))
    return text
