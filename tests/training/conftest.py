"""A torch.distributed group of one process, for tests of the engine that need no second one."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def one_process() -> None:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for a launcher's variable
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
