"""Storage, the reader and the stream against a real S3 server, over a line that fails."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.fs
import pytest
import ray

from dico_ray import cluster, ingest, signed, storage
from dico_ray.config import ConfigError, StorageSettings
from dico_ray.data.generated import gaps, image_set, to_png
from dico_ray.data.image_sets import ImageSet
from dico_ray.data.reader import Samples, read_chunks
from dico_ray.data.shards import MANIFEST, Manifest, ShardError
from dico_ray.reading import ImageReaders
from dico_ray.settings import build
from dico_ray.signed import SignedReader
from dico_ray.storage import Storage, StorageError
from tests.s3 import BUCKET, FAULTS, KEY, SECRET, FaultProxy, Server, server

pytestmark = pytest.mark.ray

Use = Callable[..., None]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def proxy(s3: Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as found:
        yield found


@pytest.fixture(params=["fsspec", "pyarrow"])
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def use(library: str, s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Use:
    """Makes storage settings hold for this test: the server, its credentials, and what the test adds."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # its instances keep the credentials that they began with
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "ENDPOINT_URL", "ENDPOINT_URL_S3", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("DICO_RAY_STORAGE", "{}")  # so that what configure writes is taken back

    def use(**settings: Any) -> None:
        right = {"endpoint": s3.endpoint, "options": {"key": KEY, "secret": SECRET}, "retry_s": 20, "timeout_s": 10}
        storage.configure(StorageSettings(**{"library": library, **right, **settings}))

    use()
    return use


def folder(name: str) -> Storage:
    return Storage(f"s3://{BUCKET}/{name}")


@pytest.fixture(scope="module")
def local(latents: Path) -> tuple[Manifest, Samples]:
    """The data set and all its samples, read from the local folder."""
    manifest = Manifest.load(Storage(str(latents)))
    return manifest, read_chunks(Storage(str(latents)), manifest, range(len(manifest.chunks)))


@pytest.fixture(scope="module")
def uploaded(latents: Path, s3: Server) -> str:
    client = s3.client()
    for path in latents.iterdir():
        client.put_object(Bucket=BUCKET, Key=f"latents/{path.name}", Body=path.read_bytes())
    return "latents"


@pytest.mark.usefixtures("use")
def test_the_promises_of_storage_hold(library: str) -> None:
    there = folder(f"promises-{library}")
    assert there.names() == []
    assert there.folders() == []
    for name in ("b.tar", "a/2.tar", "a/1.json", "a/deep/er.tar"):
        there.write(name, b"x")
    assert there.names() == ["a/1.json", "a/2.tar", "a/deep/er.tar", "b.tar"]
    assert there.names(".tar") == ["a/2.tar", "a/deep/er.tar", "b.tar"]
    assert there.folders() == ["a"]
    assert there.at("a").names() == ["1.json", "2.tar", "deep/er.tar"]
    there.write("x", bytes(range(100)))
    assert there.exists("x")
    assert there.size("x") == 100
    for start, stop in ((10, 20), (0, 1), (90, 200), (5, None), (100, 110), (150, 160), (5, 5)):
        assert there.read("x", start, stop) == bytes(range(100))[start:stop]
    buffer = bytearray(20)
    assert there.read_into("x", 90, memoryview(buffer)) == 10
    assert buffer == bytes(range(90, 100)) + bytes(10)
    there.write("x", b"new")
    assert there.read("x") == b"new"
    there.write("empty", b"")
    assert there.read("empty") == there.read("empty", 0, 5) == b""
    for name in ("x", "empty", "a", "a"):
        there.remove(name)
    assert there.names() == ["b.tar"]
    assert not there.exists("x")
    for call in (there.size, there.read, lambda name: there.read(name, 0, 5)):
        with pytest.raises(FileNotFoundError):
            call("x")


@pytest.mark.usefixtures("use")
def test_files_of_several_parts(library: str) -> None:
    data = np.random.default_rng(0).bytes(12_000_000)
    folder(library).write("big", data)
    assert folder(library).read("big") == data
    assert folder(library).read("big", 1000, 9_000_000) == data[1000:9_000_000]


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("format", ["png", "webdataset", "npz"])
def test_generated_images_are_stored_and_found(library: str, format: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 512, 512, 3), np.uint8)
    images = image_set(format, folder(f"generated-{library}-{format}"), ("a", "b"), 6)
    for start, stop in ((3, 6), (0, 3)):
        parts = [images.put(i, i % 2, pictures[i]) for i in range(start, stop)]
        images.close((start, stop), [i % 2 for i in range(start, stop)], parts)
    assert gaps(6, images.held()) == []
    images.finish(np.arange(6) % 2)
    found = images.read([5, 1])
    assert all(np.array_equal(found[i], pictures[i]) for i in (1, 5))
    assert gaps(6, images.held()) == []
    images.clear()
    assert images.held() == []


@pytest.mark.usefixtures("use")
def test_a_missing_bucket_is_named() -> None:
    with pytest.raises(StorageError, match=r"s3://nosuchbucket/x/file"):
        Storage("s3://nosuchbucket/x").write("file", b"x")
    with pytest.raises(FileNotFoundError):
        Storage("s3://nosuchbucket/x").read("file", 0, 5)
    assert Storage("s3://nosuchbucket/x").names() == []


CALLS: list[Callable[[Storage], Any]] = [
    lambda there: there.write("x", b"x"),
    lambda there: there.read(MANIFEST),
    lambda there: there.read(MANIFEST, 0, 5),
    lambda there: there.exists(MANIFEST),
    lambda there: there.size(MANIFEST),
    lambda there: there.names(),
    lambda there: there.folders(),
]


@pytest.mark.parametrize("who", ["wrong secret", "unknown key", "nobody", "anonymous", "expired"])
def test_refusals_name_the_credentials_at_once(use: Use, proxy: FaultProxy, uploaded: str, who: str) -> None:
    options = {"wrong secret": {"key": KEY, "secret": "no"}, "unknown key": {"key": "no", "secret": "no"}}
    use(options=options.get(who, {}), anonymous=who == "anonymous", retry_s=60)
    if who == "expired":
        use(endpoint=proxy.endpoint, retry_s=60)
        proxy.refuse = "ExpiredToken"
    started = time.monotonic()
    for call in CALLS:
        with pytest.raises((StorageError, ConfigError), match=r"s3://bucket/latents.*AWS_SECRET_ACCESS_KEY"):
            call(folder(uploaded))
    assert time.monotonic() - started < 30


def test_the_environment_gives_endpoint_and_credentials(
    use: Use, s3: Server, uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(endpoint="", options={})
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert MANIFEST in folder(uploaded).names()


@pytest.mark.parametrize("wrong", [{"options": {"nonsense": 1}}])
def test_options_that_the_library_does_not_know_are_named(use: Use, wrong: dict[str, Any]) -> None:
    use(**wrong)
    with pytest.raises(ConfigError, match=r"nonsense.*storage\.options"):
        folder("x").names()


def same(found: Samples, due: Samples) -> bool:
    return found.latents.tobytes() == due.latents.tobytes() and found.labels.tolist() == due.labels.tolist()


def test_faults_on_the_way_change_nothing(
    use: Use, proxy: FaultProxy, uploaded: str, library: str, local: tuple[Manifest, Samples]
) -> None:
    manifest, due = local
    use(endpoint=proxy.endpoint)
    there = folder(uploaded)
    assert Manifest.load(there) == manifest
    storage.retried.clear()
    proxy.rate = 0.5
    for _ in range(60):
        assert same(read_chunks(there, manifest, range(len(manifest.chunks))), due)
        if proxy.injected.total() >= 60 and set(proxy.injected) == set(FAULTS):
            break
    print("injected", dict(proxy.injected), "retried", dict(storage.retried))
    assert proxy.injected.total() >= 40
    assert set(proxy.injected) == set(FAULTS)
    # Each fault but slowness costs one repetition, of one kind or another. pyarrow does not notice that a body is short
    # of its range: there the hash does, unless the memory happened to hold the right bytes already.
    unseen = proxy.injected.total() - proxy.injected["slow"] - storage.retried.total()
    assert 0 <= unseen <= (0 if library == "fsspec" else proxy.injected["short"])
    assert storage.retried["short read"] == (proxy.injected["short"] if library == "fsspec" else 0)
    silent = proxy.injected["flipped"] + proxy.injected["short"]
    assert storage.retried["hash"] + storage.retried["short read"] == silent - unseen


def test_an_answer_that_never_comes_ends_at_the_time_limit(
    use: Use, proxy: FaultProxy, uploaded: str, local: tuple[Manifest, Samples]
) -> None:
    use(endpoint=proxy.endpoint, timeout_s=1, retry_s=1)
    proxy.hang_s = 20
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"shard-00000\.tar at byte 0.*storage\.retry_s"):
        read_chunks(folder(uploaded), local[0], [0])
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("damage", ["gone", "cut", "ends before", "changed"])
def test_a_damaged_shard_is_named_at_once(
    use: Use, s3: Server, latents: Path, library: str, local: tuple[Manifest, Samples], damage: str
) -> None:
    use(retry_s=60)
    manifest, name = local[0], local[0].shards[0].name
    _, _, start, stop = manifest.span(1)
    data = bytearray((latents / name).read_bytes())
    key = f"damaged-{library}/{name}"
    if damage == "changed":
        data[start + 2000] ^= 1
    else:
        data = data[: {"gone": 0, "cut": stop - 1, "ends before": start - 10}[damage]]
    s3.client().put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    if damage == "gone":
        s3.client().delete_object(Bucket=BUCKET, Key=key)
    cause = {"gone": "the shard is gone", "changed": "the shard was changed"}.get(damage, "the shard is cut short")
    started = time.monotonic()
    with pytest.raises(ShardError, match=rf"s3://bucket/{key} at byte {start}: .*{cause}"):
        read_chunks(folder(f"damaged-{library}"), manifest, [1])
    assert time.monotonic() - started < 20


def test_a_store_that_comes_back_is_waited_for(
    use: Use, proxy: FaultProxy, uploaded: str, local: tuple[Manifest, Samples]
) -> None:
    use(endpoint=proxy.endpoint, retry_s=60)
    there = folder(uploaded)
    there.read(MANIFEST)
    storage.retried.clear()
    proxy.away(3)
    found = read_chunks(there, local[0], [0, 5])
    assert not proxy.is_away
    assert np.array_equal(found.labels[:16], local[1].labels[:16])
    assert storage.retried.total() > 2


def test_a_store_that_stays_away_names_the_limit(
    use: Use, proxy: FaultProxy, uploaded: str, local: tuple[Manifest, Samples]
) -> None:
    use(endpoint=proxy.endpoint, retry_s=1)
    proxy.away(60)
    with pytest.raises(StorageError, match=r"shard-00000\.tar at byte 0: failed for 1 s \(storage\.retry_s\)"):
        read_chunks(folder(uploaded), local[0], [0])
    with pytest.raises(StorageError, match=r"storage\.retry_s"):
        folder(uploaded).names()


def _plain(there: Storage) -> SignedReader | None:
    return signed.reader(there.library, frozenset(there.settings.options), there.settings.timeout_s)


@pytest.mark.parametrize("library", ["fsspec"], indirect=True)
def test_ranges_come_by_plain_requests_over_few_connections(use: Use, uploaded: str, proxy: FaultProxy) -> None:
    use(endpoint=proxy.endpoint)
    there, name = folder(uploaded), "shard-00000.tar"
    due = there.read(name)
    plain = _plain(there)
    assert plain
    before = proxy.requests.total()
    for start in range(0, 1000, 100):
        buffer = bytearray(100)
        assert plain.read_into(there.path(name), start, memoryview(buffer)) == 100
        assert buffer == due[start : start + 100]
    assert proxy.requests.total() - before == 10
    assert len(plain._idle) == 1
    buffer = bytearray(100)
    assert plain.read_into(there.path(name), len(due) - 30, memoryview(buffer)) == 30  # the file ends there
    assert buffer[:30] == due[-30:]


@pytest.mark.parametrize("library", ["fsspec"], indirect=True)
def test_a_connection_that_the_server_closed_meanwhile_is_no_failure(use: Use, s3: Server, uploaded: str) -> None:
    there, name = folder(uploaded), "shard-00000.tar"
    plain, buffer = _plain(there), memoryview(bytearray(10))
    assert plain
    assert plain.read_into(there.path(name), 0, buffer) == 10
    plain._idle[0].sock.shutdown(2)
    assert plain.read_into(there.path(name), 0, buffer) == 10
    storage.retried.clear()
    assert len(there.read(name, 0, 10)) == 10
    assert not storage.retried


@pytest.mark.parametrize("library", ["fsspec"], indirect=True)
def test_what_a_plain_request_cannot_do_is_left_to_s3fs(
    use: Use, uploaded: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, name, buffer = folder(uploaded), "shard-00000.tar", memoryview(bytearray(10))
    plain = _plain(there)
    assert plain
    assert plain.read_into(there.path("nothing"), 0, buffer) is None  # 404: s3fs says what is wrong
    assert plain.read_into(there.path(name), 10**9, buffer) is None  # 416
    plain._addresses[there.path(name)] = urlsplit(f"{proxy.endpoint}/{there.path(name)}?X-Amz-Expires=1"), math.inf
    assert plain.read_into(there.path(name), 0, buffer) is None  # an address that is good no more
    assert plain.read_into(there.path(name), 0, buffer) == 10  # is asked for again
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert plain.read_into(there.path(name), 0, buffer) is None
    monkeypatch.delenv("http_proxy")
    use(options={"key": KEY, "secret": SECRET, "client_kwargs": {"region_name": "us-east-1"}})
    assert _plain(folder(uploaded)) is None
    assert folder(uploaded).read(name, 0, 5)


STEPS = 60


def _stream(url: str) -> dict[int, dict[str, np.ndarray]]:
    """Two workers' batches put together, by step."""
    config = build({
        "data": {"latents": url, "window_samples": 70, "read_tasks": 2},
        "model": {"latent_size": 8, "num_classes": 10},
        "train": {"global_batch": 24, "steps": STEPS, "num_workers": 2, "data_timeout_s": 60},
    })  # fmt: skip
    dataset = ingest.training_dataset(config, Manifest.load(Storage(url)), 0)
    dataset.context.execution_options = ingest.execution_options()

    @ray.remote(num_cpus=0)
    def consume(shard: Any, rank: int) -> dict[int, tuple[np.ndarray, ...]]:
        return {b.step: (b.keys, b.labels, b.latents) for b in ingest.rank_batches(shard, config, rank, 0)}

    splits = dataset.streaming_split(2, equal=True)
    parts = ray.get([consume.remote(split, rank) for rank, split in enumerate(splits)])
    names = ("keys", "labels", "latents")
    return {
        step: {name: np.concatenate([part[step][i] for part in parts]) for i, name in enumerate(names)}
        for step in range(STEPS)
    }


@cache
def _undisturbed(url: str) -> dict[int, dict[str, np.ndarray]]:
    return _stream(url)


def _read_webdataset(endpoint: str, shards: list[str], samples: int) -> str:
    """What Ray's own reader makes of the same line: 'whole', 'rows lost without a word', or 'an error'."""
    store = pyarrow.fs.S3FileSystem(access_key=KEY, secret_key=SECRET, endpoint_override=endpoint, region="us-east-1")
    try:
        rows = ray.data.read_webdataset(shards, filesystem=store, decoder=None).take_all()
    except (ray.exceptions.RayError, OSError, ValueError):
        return "an error"
    return "whole" if len(rows) == samples else "rows lost without a word"


def test_the_stream_is_the_same_over_a_line_that_fails(
    use: Use, proxy: FaultProxy, uploaded: str, latents: Path, local: tuple[Manifest, Samples]
) -> None:
    use(endpoint=proxy.endpoint, retry_s=120)  # before Ray starts: its workers inherit it
    cluster.quiet()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        due = _undisturbed(str(latents))
        proxy.rate = 0.45
        found = _stream(folder(uploaded).url)
        injected = proxy.injected.total()
        shards = [f"{BUCKET}/{uploaded}/{shard.name}" for shard in local[0].shards]
        theirs = Counter(_read_webdataset(proxy.endpoint, shards, local[0].count) for _ in range(6))
    finally:
        ray.shutdown()
    print(f"{injected} faults into our stream; ray.data.read_webdataset on the same line, six times: {dict(theirs)}")
    assert injected >= 40
    assert theirs.total() == 6
    for step, batch in due.items():
        for name, column in batch.items():
            assert found[step][name].tobytes() == column.tobytes(), (step, name)


def test_images_are_read_by_processes_over_a_line_that_fails(use: Use, proxy: FaultProxy, library: str) -> None:
    """File by file, by processes that inherit how the store is reached."""
    pixels, images = np.random.default_rng(0).integers(0, 256, (80, 6, 6, 3), dtype=np.uint8), folder(f"png-{library}")
    for i, image in enumerate(pixels):
        images.write(f"{i:03d}.png", to_png(image))
    use(endpoint=proxy.endpoint, retry_s=120)  # before Ray starts: its workers inherit it
    cluster.quiet()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        source, readers = ImageSet.scan(images.url, "evaluate.images"), ImageReaders(4)
        # A bit that flips on the way, or a body that an answer's head says is shorter, would need a hash to be noticed.
        proxy.rate, proxy.kinds = 0.3, tuple(kind for kind in FAULTS if kind not in ("flipped", "short"))
        found = list(readers.batches(source, [(0, 50), (50, 80)]))
    finally:
        ray.shutdown()
    assert proxy.injected.total() >= 10
    assert np.array_equal(np.concatenate(found), pixels)
