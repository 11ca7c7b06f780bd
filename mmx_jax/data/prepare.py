"""Prepares a token store: python -m mmx_jax.data.prepare --inputs python:stdlib --output build/stdlib --vocab_size 4096

The store is a pure function of the inputs and the configuration, whatever the number of processes. A run that was
killed goes on from its finished shards. The manifest is written last: a folder with a manifest is a whole store.
"""

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
from absl import app, flags

from mmx_jax.config import ConfigError, PrepareConfig, TokenizerConfig
from mmx_jax.config.command_line import fail_with, parse_flags
from mmx_jax.data.duplicates import REPORT, find_duplicates
from mmx_jax.data.errors import DataError
from mmx_jax.data.inputs import Inputs, find_inputs
from mmx_jax.data.shards import SPLITS, storage_errors, write_json
from mmx_jax.data.store import FORMAT, MANIFEST, Manifest, TokenStore, verify
from mmx_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mmx_jax.data.work import ShardJob, plan_shards, sample_text, tokenize_shard
from mmx_jax.data.workers import available_cores, run_jobs

PROGRESS = "unfinished.json"
INPUTS = "inputs.json"
"""Name, bytes and time of the last change of every file that a store was prepared from."""
log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, progress: bool = True, refuse_changes: bool = False) -> Manifest:
    """Prepares a token store, or goes on with an unfinished one, or returns the finished one.

    Args:
      config: what from, where to, how.
      progress: shows a progress bar on the standard error.
      refuse_changes: a finished store whose inputs have changed since is an error, not a warning.

    Returns:
      The manifest of the store in `config.output`.

    Raises:
      DataError: the corpus is missing, empty or unreadable; the folder holds another store; the disk is full or
        read-only; a worker died. No manifest is written then.
    """
    folder = Path(config.output)
    with storage_errors(folder):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    request = _request(config)
    with _exclusive(folder):
        if (folder / MANIFEST).exists():
            manifest = _finished(folder, request)
            _compare_inputs(folder, config, refuse_changes)
            return manifest
        inputs = find_inputs(config.inputs, config.include, config.exclude)
        _begin(folder, request, inputs)
        jobs = plan_shards(inputs, config)
        processes = config.processes or available_cores()
        with _bar(progress) as bar:
            removed: dict[int, frozenset[int]] = {}
            if config.deduplicate:
                removed = find_duplicates(jobs, config, processes, bar)
            if not (folder / "tokenizer_config.json").exists():
                _provide_tokenizer(folder, config, jobs, bar)
            jobs = [replace(job, removed=removed.get(job.number, frozenset())) for job in jobs]
            todo = [job for job in jobs if not job.finished()]
            task = bar.add_task("tokenise", total=len(jobs), completed=len(jobs) - len(todo))
            for _, _ in run_jobs(tokenize_shard, todo, processes, ShardJob.describe):
                bar.advance(task)
        return _complete(folder, config, request, inputs, jobs)


def _request(config: PrepareConfig) -> dict[str, Any]:
    """What decides the store's contents."""
    request = {name: value for name, value in asdict(config).items() if name not in ("output", "processes")}
    return json.loads(json.dumps(request))


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One preparation of a folder at a time; a second process waits and then finds the store finished."""
    with storage_errors(folder):
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _finished(folder: Path, request: dict[str, Any]) -> Manifest:
    manifest = Manifest.read(folder)
    if manifest.request != request:
        changed = [key for key in request if manifest.request.get(key) != request[key]]
        raise DataError(
            f"{folder}: holds a store that was prepared with other values of {', '.join(changed)}: "
            f"{ {key: manifest.request.get(key) for key in changed} }; choose another output, or delete the folder"
        )
    for split in SPLITS:
        TokenStore(folder, split)
    return manifest


def _compare_inputs(folder: Path, config: PrepareConfig, refuse: bool) -> None:
    """Says how the inputs differ from those of the finished store; inputs that are gone altogether are no change.

    Raises:
      DataError: names or sizes of the files differ, and that is to be refused.
    """
    try:
        before = json.loads((folder / INPUTS).read_bytes())
        now = _listing(find_inputs(config.inputs, config.include, config.exclude))
    except (OSError, ValueError, DataError):  # a store outlives its corpus, and may come without its listing
        return
    old, new = ({name: size for name, size, _ in files} for files in (before, now))
    changes = [("added", [name for name in new if name not in old]),
               ("gone", [name for name in old if name not in new]),
               ("of another size", [name for name in new if old.get(name, new[name]) != new[name]])]  # fmt: skip
    said = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in changes if names)
    if said:
        message = (
            f"{folder}: holds a store of the inputs as they were; since then files are {said}. "
            "Delete the folder to prepare it anew, or choose another output"
        )
        if refuse:
            raise DataError(message)
        log.warning("%s", message)
    elif touched := [name for (name, _, then), (_, _, modified) in zip(before, now) if then != modified]:
        log.warning("%s: not prepared anew; %d inputs of the same size were written since (%s): delete the folder if "
                    "their text changed", folder, len(touched), ", ".join(touched[:3]))  # fmt: skip


def _listing(inputs: Inputs) -> list[list[Any]]:
    return [[file.name, file.size, file.modified] for file in inputs.files]


def _begin(folder: Path, request: dict[str, Any], inputs: Inputs) -> None:
    """Keeps what an interrupted run of the same work left, and removes everything else."""
    listing = hashlib.sha256(json.dumps([asdict(file) for file in inputs.files]).encode()).hexdigest()
    work = {"format": FORMAT, "request": request, "inputs": listing}
    path = folder / PROGRESS
    with storage_errors(folder):
        if _interrupted(path) != work:
            if path.exists():
                log.warning("%s: not the interrupted run of these inputs and settings; starting anew", folder)
            shutil.rmtree(folder / "shards")
            (folder / "shards").mkdir()
            for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", REPORT):
                (folder / name).unlink(missing_ok=True)
            write_json(path, work)
        write_json(folder / INPUTS, _listing(inputs))


def _interrupted(path: Path) -> Any:
    """The work that an interrupted run noted; None if there is none, or the note is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _provide_tokenizer(folder: Path, config: PrepareConfig, jobs: list[ShardJob], bar: rich.progress.Progress) -> None:
    with storage_errors(folder):
        if config.tokenizer.path is not None:
            load_tokenizer(config.tokenizer.path, config.tokenizer.end_of_text).save(folder)
            return
        task = bar.add_task("train tokenizer", total=None)
        train_tokenizer(sample_text(jobs, config), folder / "tokenizer.model", config.tokenizer).save(folder)
        bar.update(task, total=1, completed=1)


def _complete(
    folder: Path, config: PrepareConfig, request: dict[str, Any], inputs: Inputs, jobs: list[ShardJob]
) -> Manifest:
    records = [json.loads(job.record.read_text()) for job in jobs]
    splits = {split: [record["splits"][split] for record in records if record["splits"][split]] for split in SPLITS}
    tokenizer = load_tokenizer(folder)
    if not splits["train"]:
        held_out = sum(shard["documents"] for shard in splits["held_out"])
        raise DataError(
            f"{folder}: no training document: {held_out} documents are held out and the rest is empty; "
            "set held_out_fraction to 0, or cut a long document with document_bytes"
        )
    if config.held_out_fraction and not splits["held_out"]:
        log.warning("%s: no document is held out; raise held_out_fraction or cut documents with document_bytes", folder)
    replaced: dict[str, int] = {}
    for record in records:
        for path, count in record["report"]["replaced"].items():
            replaced[path] = replaced.get(path, 0) + count
    for path, count in replaced.items():
        log.warning("%s: %d invalid UTF-8 sequences became U+FFFD", path, count)
    summaries = {split: _summary(folder, shards) for split, shards in splits.items()}
    totals = {key: sum(summary[key] for summary in summaries.values()) for key in ("documents", "tokens", "bytes")}
    manifest = Manifest(
        format=FORMAT,
        license=config.license,
        request=request,
        tokenizer={
            "file": tokenizer.file.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": tokenizer.end_of_text_id,
        },
        splits=summaries,
        statistics=totals
        | {
            "bytes_per_token": totals["bytes"] / totals["tokens"],
            "files": len(inputs.files),
            "files_skipped": inputs.skipped,
            "empty_documents": sum(record["report"]["empty"] for record in records),
            "duplicates_removed": sum(len(job.removed) for job in jobs),
            "invalid_utf8": replaced,
        },
    )
    with storage_errors(folder):
        manifest.write(folder)
        for job in jobs:
            job.record.unlink()
        (folder / PROGRESS).unlink()
    return manifest


def _summary(folder: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of a split, and how many documents have at least 2^i and fewer than 2^(i+1) tokens."""
    histogram = np.zeros(64, np.int64)
    for shard in shards:
        index = np.fromfile(folder / "shards" / f"{shard['stem']}.index", "<i8").reshape(-1, 3)
        lengths = np.diff(index[:, 0], prepend=0)
        histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=64)
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "documents_by_length": {str(2**i): int(count) for i, count in enumerate(histogram) if count},
        "shards": shards,
    }


def _bar(progress: bool) -> rich.progress.Progress:
    return rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        disable=not progress,
        transient=True,
    )


def _define_flags() -> None:
    defaults: dict[str, Any] = {field.name: field.default for field in fields(PrepareConfig)}
    flags.DEFINE_list(
        "inputs", None, "Files, folders and globs, comma-separated; python:stdlib is Python's own library."
    )
    flags.DEFINE_string("output", None, "Folder of the token store.")
    flags.DEFINE_string("tokenizer", None, "SentencePiece .model or tokenizer.json to use; none trains one.")
    flags.DEFINE_string("end_of_text", None, "Piece of that tokenizer that ends documents.")
    flags.DEFINE_integer("vocab_size", TokenizerConfig().vocab_size, "Pieces of a tokenizer to train.")
    flags.DEFINE_integer("training_bytes", TokenizerConfig().training_bytes, "Text to train it on, in bytes.")
    flags.DEFINE_string("text_field", defaults["text_field"], "Field of a record that holds its text.")
    flags.DEFINE_list("include", [], "File name patterns taken from folders.")
    flags.DEFINE_list("exclude", [], "Path patterns left out.")
    flags.DEFINE_integer("document_bytes", None, "Cut longer documents at line ends.")
    flags.DEFINE_float("held_out_fraction", defaults["held_out_fraction"], "Share of documents set aside.")
    flags.DEFINE_list("deduplicate", [], "exact, near, or both.")
    flags.DEFINE_float("near_threshold", defaults["near_threshold"], "Similarity from which near duplicates go.")
    flags.DEFINE_string("license", defaults["license"], "Licence of the text, kept in the manifest.")
    flags.DEFINE_integer("processes", defaults["processes"], "Processes; 0 is one per core.")
    flags.DEFINE_boolean("verify", False, "Check every file of an existing store against its checksum instead.")


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code: 1 for a store that `--verify` finds damaged, 2 for what cannot work."""
    values = flags.FLAGS
    try:
        if argv[1:]:
            raise ConfigError(f"unexpected arguments: {' '.join(argv[1:])}; inputs are named by --inputs=a,b")
        if values.verify:
            problems = verify(values.output)
            print("\n".join(problems) or f"{values.output}: every file is as it was written")
            return bool(problems)
        config = PrepareConfig(
            inputs=tuple(values.inputs or ()),
            output=values.output,
            tokenizer=TokenizerConfig(
                path=values.tokenizer,
                end_of_text=values.end_of_text,
                vocab_size=values.vocab_size,
                training_bytes=values.training_bytes,
            ),
            text_field=values.text_field,
            include=tuple(values.include),
            exclude=tuple(values.exclude),
            document_bytes=values.document_bytes,
            held_out_fraction=values.held_out_fraction,
            deduplicate=tuple(values.deduplicate),
            near_threshold=values.near_threshold,
            license=values.license,
            processes=values.processes,
        )
        manifest = prepare(config, refuse_changes=True)
    except (ConfigError, DataError) as error:
        return fail_with(error)
    for split in SPLITS:
        summary = manifest.splits[split]
        print(f"{split}: {summary['documents']:,} documents, {summary['tokens']:,} tokens, {summary['bytes']:,} bytes")
    statistics = {key: value for key, value in manifest.statistics.items() if key not in manifest.splits["train"]}
    print(json.dumps(statistics, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    _define_flags()
    flags.mark_flag_as_required("output")
    logging.basicConfig(format="%(levelname)s %(message)s")
    app.run(main, flags_parser=parse_flags)
