"""Google Cloud Storage by the extra `gs`: gcsfs against a server that speaks its JSON API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gcp_storage_emulator.server import create_server

from dico_ray import storage
from dico_ray.config import StorageSettings
from dico_ray.data.reader import read_chunks
from dico_ray.data.shards import Manifest
from dico_ray.storage import Storage
from tests.s3 import free_ports

pytestmark = pytest.mark.ray


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (port,) = free_ports(1)
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("DICO_RAY_STORAGE", "{}")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # Read once, when gcsfs is imported: the emulator has no gRPC, by which gcsfs asks what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    storage.configure(StorageSettings(endpoint=f"http://127.0.0.1:{port}", anonymous=True, retry_s=5))
    yield
    server.stop()


@pytest.mark.usefixtures("gs")
def test_shards_are_written_listed_and_read_by_ranges(latents: Path) -> None:
    there, here = Storage("gs://bucket/latents"), Storage(str(latents))
    assert there.names() == []
    for name in here.names():
        there.write(name, here.read(name))
    assert there.names() == here.names()
    assert there.exists("manifest.json")
    assert not there.exists("nothing")
    with pytest.raises(FileNotFoundError):
        there.read("nothing")
    manifest = Manifest.load(there)
    chunks = range(len(manifest.chunks))
    found, due = read_chunks(there, manifest, chunks), read_chunks(here, manifest, chunks)
    assert np.array_equal(found.latents, due.latents)
    there.remove(manifest.shards[0].name)
    assert not there.exists(manifest.shards[0].name)
