"""`dico-ray data verify`: reads all of a set of latent shards and checks every sample, more than training does.

Beyond the hashes: each archive's headers, the keys (no two alike), every label and every value, and that the
files are those of the manifest, no fewer, no longer and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from dico_ray.config import Config, UserError
from dico_ray.data.reader import general_samples, where
from dico_ray.data.shards import Manifest, ShardError
from dico_ray.data.tars import TarError, read_samples
from dico_ray.progress import Progress
from dico_ray.storage import Storage


def main(config: Config, *, verbose: bool, url: str, threads: int) -> None:
    """Prints every damage it finds. Raises ConfigError without a manifest, ShardError if there was any damage."""
    storage = Storage(url)
    manifest = Manifest.load(storage)
    damages = list(check_files(storage, manifest))
    keys: set[str] = set()
    done = 0
    with ThreadPoolExecutor(threads) as pool, Progress("verify", manifest.count, "samples") as progress:
        chunks = range(len(manifest.chunks))
        for chunk, (found, damage) in enumerate(pool.map(lambda c: check_chunk(storage, manifest, c), chunks)):
            damages += [damage] if damage else []
            twins = keys & set(found)
            damages += [f"{where(storage, manifest, chunk)}: sample {min(twins)!r} is there twice"] if twins else []
            keys |= set(found)
            done += manifest.chunk_sizes[chunk]
            progress.update(done)
    for damage in damages:
        print(damage)
    if damages:
        raise ShardError(f"{url}: {len(damages)} damages in {manifest.count:,} samples, listed above")
    print(f"verify: {manifest.count:,} samples in {len(manifest.shards):,} shards are what the manifest says")


def check_files(storage: Storage, manifest: Manifest) -> Iterator[str]:
    """Shards that are missing, of another length, or not the manifest's."""
    for shard in manifest.shards:
        try:
            size = storage.size(shard.name)
        except FileNotFoundError:
            yield f"{storage.url}/{shard.name}: the shard is gone"
            continue
        if size != shard.bytes:
            yield f"{storage.url}/{shard.name}: {size:,} bytes, the manifest says {shard.bytes:,}"
    for name in sorted(set(storage.names(".tar")) - {shard.name for shard in manifest.shards}):
        yield f"{storage.url}/{name}: not in the manifest; training never reads it"


def check_chunk(storage: Storage, manifest: Manifest, chunk: int) -> tuple[list[str], str]:
    """(keys, what is wrong with the chunk or '')."""
    shard, number, start, stop = manifest.span(chunk)
    at = where(storage, manifest, chunk)
    try:
        data = storage.read(shard.name, start, stop)
        if xxhash.xxh3_128_hexdigest(data) != shard.hashes[number]:
            raise ShardError(f"{at}: {len(data):,} bytes whose hash is not the manifest's")
        samples = general_samples(memoryview(data), manifest, at)
        if len(samples.labels) != manifest.chunk_sizes[chunk]:
            raise ShardError(f"{at}: {len(samples.labels)} samples, the manifest says {manifest.chunk_sizes[chunk]}")
        wrong = ~np.isfinite(samples.latents).all(axis=(1, 2, 3, 4)) | (samples.labels >= len(manifest.classes))
        if wrong.any():
            raise ShardError(f"{at}: sample {int(wrong.argmax())} of the chunk holds NaN or a label out of range")
        return [key for key, _ in read_samples(data, at)], ""
    except FileNotFoundError:
        return [], ""  # told of the whole shard already
    except (ShardError, TarError) as error:
        return [], str(error)
    except UserError as error:
        return [], f"{at}: {error}"
