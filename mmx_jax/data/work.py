"""The work on one shard: which part of the corpus it is, and its tokens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq

from mmx_jax.config import PrepareConfig
from mmx_jax.data.inputs import Inputs
from mmx_jax.data.readers import Document, Piece, ReadReport, open_input, read_documents
from mmx_jax.data.shards import SPLITS, SplitWriter, storage_errors, token_dtype, write_json
from mmx_jax.data.shuffle import fold, permutation
from mmx_jax.data.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 16 << 20
MOST_SHARDS = 4096
TEXT_PER_COMPRESSED_BYTE = 4
SAMPLE_BLOCK = 1 << 16


@dataclass(frozen=True)
class ShardJob:
    """One shard's work, independent of all others."""

    number: int
    pieces: tuple[Piece, ...]
    config: PrepareConfig
    removed: frozenset[int] = frozenset()
    """Documents, counted within the shard, that are duplicates of others."""

    @property
    def stem(self) -> str:
        return f"{self.number:05d}"

    @property
    def record(self) -> Path:
        """The file that says that the shard is finished."""
        return Path(self.config.output) / "shards" / f"{self.stem}.json"

    def finished(self) -> bool:
        """Whether an earlier run wrote the shard: its record is there, and its files have the recorded sizes."""
        try:
            entries = [entry for entry in json.loads(self.record.read_bytes())["splits"].values() if entry]
        except (FileNotFoundError, ValueError):  # no record, or a damaged one
            return False
        files = [
            (f"{entry['stem']}.{kind}", file["bytes"]) for entry in entries for kind, file in entry["files"].items()
        ]
        paths = [(self.record.with_name(name), size) for name, size in files]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def documents(self, report: ReadReport) -> Iterator[Document]:
        """All documents of the shard, duplicates included."""
        for piece in self.pieces:
            yield from read_documents(piece, self.config.text_field, self.config.document_bytes, report)

    def describe(self) -> str:
        return f"shard {self.stem} ({self.pieces[0].file.path}{' ...' if len(self.pieces) > 1 else ''})"


def plan_shards(inputs: Inputs, config: PrepareConfig) -> list[ShardJob]:
    """Cuts the corpus into shards of about 16 MiB of text (more for a corpus beyond 64 GiB), in input order.

    Large JSONL files are cut at lines and Parquet files at row groups; text and compressed files are not cut.

    Raises:
      DataError: a Parquet file cannot be read; names it.
    """
    weights = [file.size * (TEXT_PER_COMPRESSED_BYTE if file.compression else 1) for file in inputs.files]
    target = max(SHARD_BYTES, sum(weights) // MOST_SHARDS)
    jobs: list[ShardJob] = []
    group: list[Piece] = []
    filled = 0
    for file, weight in zip(inputs.files, weights):
        pieces: list[tuple[Piece, int]] = [(Piece(file), weight)]
        if file.kind == "jsonl" and file.compression is None and weight > target:
            starts = range(0, file.size, target)
            pieces = [(Piece(file, start, min(start + target, file.size)), target) for start in starts]
        elif file.kind == "parquet" and weight > target:
            with open_input(file) as stream, pq.ParquetFile(stream) as table:
                groups = table.num_row_groups
            pieces = [(Piece(file, group, group + 1), weight // groups) for group in range(groups)]
        for piece, size in pieces:
            if group and filled + size > target:
                jobs.append(ShardJob(len(jobs), tuple(group), config))
                group, filled = [], 0
            group.append(piece)
            filled += size
    jobs.append(ShardJob(len(jobs), tuple(group), config))
    return jobs


def sample_text(jobs: list[ShardJob], config: PrepareConfig) -> Iterator[str]:
    """Training text spread over the corpus: blocks of documents that are not held out, chosen by a hash.

    Of a corpus that is much larger than the sample only so many shards are read that they hold four times the sample.
    """
    sizes = {job.number: _text_bytes(job) for job in jobs}
    wanted = config.tokenizer.training_bytes
    chosen: list[ShardJob] = []
    for number in permutation(len(jobs), 0):
        if sum(sizes[job.number] for job in chosen) >= 4 * wanted:
            break
        chosen.append(jobs[number])
    share = wanted / max(1, sum(sizes[job.number] for job in chosen))
    taken = 0
    for job in sorted(chosen, key=lambda job: job.number):
        for ordinal, document in enumerate(job.documents(ReadReport())):
            if is_held_out(document.name, config.held_out_fraction):
                continue
            block = 0
            for span in document.spans:
                for chunk in span.chunks:
                    for start in range(0, len(chunk), SAMPLE_BLOCK):
                        block += 1
                        if share < 1 and fold(job.number, ordinal, block) >= share * 2**64:
                            continue
                        text = chunk[start : start + SAMPLE_BLOCK]
                        taken += len(text.encode())
                        yield text
                        if taken >= wanted:
                            return


def _text_bytes(job: ShardJob) -> int:
    total = 0
    for piece in job.pieces:
        size = piece.file.size if piece.stop is None or piece.file.kind == "parquet" else piece.stop - piece.start
        total += size * (TEXT_PER_COMPRESSED_BYTE if piece.file.compression else 1)
    return total


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this name is set aside; depends on nothing but the name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@lru_cache(maxsize=1)
def _worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def tokenize_shard(job: ShardJob) -> None:
    """Writes the files of one shard and, when they are whole, the record that says so."""
    folder = Path(job.config.output)
    tokenizer = _worker_tokenizer(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder / "shards", f"{split}-{job.stem}", dtype) for split in SPLITS}
    report = ReadReport()
    try:
        with storage_errors(folder):
            for ordinal, document in enumerate(job.documents(report)):
                if ordinal in job.removed:
                    continue
                held_out = is_held_out(document.name, job.config.held_out_fraction)
                spans = ((span.role, tokenizer.encode_chunks(span.chunks)) for span in document.spans)
                tokens, _ = writers["held_out" if held_out else "train"].add(
                    document.name, spans, tokenizer.end_of_text_id
                )
                report.empty += not tokens
            entries = {split: writer.finish() for split, writer in writers.items()}
            write_json(job.record, {"splits": entries, "report": asdict(report)})
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
