"""Exact and near duplicates: found before tokenising, reported one by one, removed by leaving them out.

The first document in corpus order stays, in whichever split it is, so that no held-out document has a twin in training.
Signatures (16 bytes a document, for "near" another 512) and the index of "near" are held in memory.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from datasketch import LeanMinHash, MinHash, MinHashLSH

from mmx_jax.config import PrepareConfig
from mmx_jax.data.readers import ReadReport
from mmx_jax.data.shards import storage_errors, write_atomically
from mmx_jax.data.work import ShardJob
from mmx_jax.data.workers import run_jobs

REPORT = "duplicates.jsonl"
PERMUTATIONS = 128
SHINGLE_WORDS = 5
SHINGLES_AT_ONCE = 8192


@dataclass(frozen=True)
class Signature:
    """What is compared of a document."""

    name: str
    digest: bytes
    """BLAKE2b of roles and text."""
    minhash: LeanMinHash | None
    """Of the document's shingles of five words; None unless near duplicates are looked for."""


def find_duplicates(
    jobs: Sequence[ShardJob], config: PrepareConfig, processes: int, bar: rich.progress.Progress
) -> dict[int, frozenset[int]]:
    """Reads the whole corpus, decides what to leave out, and writes `duplicates.jsonl` into the store.

    Each line of the report names the removed document, the one that stays, the kind, and for "near" the estimated
    Jaccard similarity of their shingles.

    Returns:
      Shard number -> documents to leave out, counted within the shard.
    """
    near = "near" in config.deduplicate
    task = bar.add_task("compare documents", total=len(jobs))
    signatures: dict[int, list[Signature]] = {}
    for job, found in run_jobs(partial(sign_shard, near=near), jobs, processes, ShardJob.describe):
        signatures[job.number] = found
        bar.advance(task)
    removed: dict[int, set[int]] = {}
    lines = []
    ordered = [(job.number, i, signature) for job in jobs for i, signature in enumerate(signatures[job.number])]
    for number, ordinal, entry in _decide(ordered, config):
        removed.setdefault(number, set()).add(ordinal)
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    folder = Path(config.output)
    with storage_errors(folder):
        write_atomically(folder / REPORT, "".join(lines).encode())
    return {number: frozenset(ordinals) for number, ordinals in removed.items()}


def sign_shard(job: ShardJob, *, near: bool) -> list[Signature]:
    """Signatures of all documents of a shard, in order."""
    signatures = []
    for document in job.documents(ReadReport()):
        digest = hashlib.blake2b(digest_size=16)
        minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int) if near else None
        for span in document.spans:
            digest.update(json.dumps(span.role).encode())
            for hashes in _shingles(_hashed(span.chunks, digest)):
                if minhash is not None:
                    minhash.update_batch(hashes)
        signatures.append(Signature(document.name, digest.digest(), None if minhash is None else LeanMinHash(minhash)))
    return signatures


def _hashed(chunks: Iterable[str], digest: Any) -> Iterator[str]:
    for chunk in chunks:
        digest.update(chunk.encode())
        yield chunk


def _shingles(chunks: Iterable[str]) -> Iterator[list[int]]:
    """32-bit hashes of all runs of five words (of the whole text, if it has fewer), in lists of bounded size."""
    words: list[int] = []
    rest = ""
    complete = False
    for chunk in chunks:
        parts = (rest + chunk).split()
        rest = parts.pop() if parts and not chunk[-1:].isspace() else ""
        for start in range(0, len(parts), SHINGLES_AT_ONCE):
            words += [zlib.crc32(word.encode()) for word in parts[start : start + SHINGLES_AT_ONCE]]
            if len(words) >= SHINGLE_WORDS:
                yield _combine(words)
                words, complete = words[1 - SHINGLE_WORDS :], True
    if rest:
        words.append(zlib.crc32(rest.encode()))
    if len(words) >= SHINGLE_WORDS:
        yield _combine(words)
    elif words and not complete:
        yield [zlib.crc32(np.array(words, np.uint32).tobytes())]


def _combine(words: list[int]) -> list[int]:
    """Hash of every run of five word hashes: a polynomial modulo 2^64, folded to 32 bits."""
    values = np.lib.stride_tricks.sliding_window_view(np.array(words, np.uint64), SHINGLE_WORDS)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(SHINGLE_WORDS, dtype=np.uint64)
    mixed = ((values + np.uint64(1)) * powers).sum(axis=1, dtype=np.uint64)
    return np.unique((mixed ^ (mixed >> np.uint64(32))) & np.uint64(0xFFFFFFFF)).tolist()


def _decide(
    ordered: Sequence[tuple[int, int, Signature]], config: PrepareConfig
) -> Iterator[tuple[int, int, dict[str, object]]]:
    """Walks the corpus in order and yields what goes, with the reason."""
    first: dict[bytes, str] = {}
    kept: dict[str, LeanMinHash] = {}
    index = MinHashLSH(threshold=config.near_threshold, num_perm=PERMUTATIONS)
    for number, ordinal, signature in ordered:
        name = signature.name
        if "exact" in config.deduplicate and (original := first.setdefault(signature.digest, name)) != name:
            yield number, ordinal, {"removed": name, "kept": original, "kind": "exact"}
            continue
        minhash = signature.minhash
        if minhash is None:
            continue
        candidates = sorted(index.query(minhash), key=lambda other: (-minhash.jaccard(kept[other]), other))
        if candidates and (similarity := minhash.jaccard(kept[candidates[0]])) >= config.near_threshold:
            entry = {"removed": name, "kept": candidates[0], "kind": "near", "similarity": round(similarity, 3)}
            yield number, ordinal, entry
        else:
            kept[name] = minhash
            index.insert(name, minhash)
