"""What every section of the config is made of: errors for users, kinds of values."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class UserError(Exception):
    """A failure that its own message explains in full: the command line prints that line and nothing else."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot work. The message is one line: the value, the rule, the setting to change."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def absolute(location: str) -> str:
    """A local path made absolute, since Ray's workers run in other folders; URLs and '' stay."""
    return location if not location or "://" in location else os.path.abspath(os.path.expanduser(location))


def absolute_if_local(location: str) -> str:
    """The same for what may also be a hub id, such as owner/name."""
    return absolute(location) if location.startswith((".", "/", "~")) or os.path.isdir(location) else location


Location = Annotated[str, AfterValidator(absolute)]


LocationOrHubId = Annotated[str, AfterValidator(absolute_if_local)]


Probability = Annotated[float, Field(ge=0.0, le=1.0)]


Timestep = Annotated[int, Field(ge=0, le=999)]


PositiveInt = Annotated[int, Field(ge=1)]
