"""What a run needs and how long it takes, from its settings and what was measured. Needs neither torch nor Ray."""

from __future__ import annotations

from dico_ray.planning.memory import Fit, check, fits

__all__ = ["Fit", "check", "fits"]
