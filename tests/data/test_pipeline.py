"""The global stream: the same for every process count, resumed anywhere, every token once an epoch."""

import json
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mmx_jax.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from mmx_jax.data import Batch, DataError, TokenStore, TrainingRows, loader
from mmx_jax.data.pipeline import SourceRows
from mmx_jax.data.prepare import prepare

T = 64


def _config(first: Path, second: Path, **changes: object) -> DataConfig:
    sources = (
        SourceConfig(name="code", store=str(first), weight=((0, 0.9), (400 * T, 0.2))),
        SourceConfig(name="chat", store=str(second), weight=((0, 0.1), (400 * T, 0.8))),
    )
    return replace(DataConfig(sources=sources, window_rows=32), **changes)


@pytest.fixture(scope="session", params=["concat", "best_fit"])
def config(request: pytest.FixtureRequest, store_folder: Path, second_store_folder: Path) -> DataConfig:
    return _config(store_folder, second_store_folder, packing=request.param)


@pytest.fixture(scope="session")
def rows(config: DataConfig) -> TrainingRows:
    return TrainingRows(config, T)


def _equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Batch))


def _join(batches: list[Batch]) -> Batch:
    return Batch(**{f.name: np.concatenate([getattr(batch, f.name) for batch in batches]) for f in fields(Batch)})


def test_any_process_count_reads_the_same_global_rows(config: DataConfig, rows: TrainingRows) -> None:
    """1, 2 and 4 processes, a batch that grows on the way: the slices put together are the rows of the stream."""
    sizes = [4, 4, 8, 8, 4]
    streams = {}
    for count in (1, 2, 4):
        loaders = [loader(TrainingRows(config, T), process_index=i, process_count=count) for i in range(count)]
        streams[count] = [_join([part.next_rows(size) for part in loaders]) for size in sizes]
        assert {part.row for part in loaders} == {sum(sizes)}
        for part in loaders:
            part.close()
    for one, two, four in zip(streams[1], streams[2], streams[4], strict=True):
        assert _equal(one, two)
        assert _equal(one, four)
    assert _equal(_join(streams[1]), Batch.stack([rows.row(r) for r in range(sum(sizes))]))


def test_resume_needs_only_the_row(rows: TrainingRows, config: DataConfig) -> None:
    """A loader opened at row r of a fresh stream gives what the first one gives there."""
    with loader(rows) as first:
        for _ in range(30):
            first.next_rows(8)
        position = first.row
        following = [first.next_rows(8) for _ in range(5)]
    fresh = TrainingRows(config, T)
    assert fresh.fingerprint == rows.fingerprint
    with loader(fresh, start_row=position) as second:
        assert all(_equal(second.next_rows(8), batch) for batch in following)


def test_far_rows_cost_no_replay(config: DataConfig) -> None:
    """A stream opened at row 10^8 is there within a second, after thousands of epochs."""
    begin = time.perf_counter()
    rows = TrainingRows(config, T)
    row = rows.row(10**8)
    assert time.perf_counter() - begin < 1
    assert row["tokens"].shape == (T,)


def test_rows_are_planned_fast_enough(rows: TrainingRows) -> None:
    """At least 2,000 rows a second through the loader, in the best of ten bursts (tests share their cores)."""
    with loader(rows) as stream:
        bursts = []
        for _ in range(10):
            begin = time.perf_counter()
            for _ in range(10):
                stream.next_rows(16)
            bursts.append(160 / (time.perf_counter() - begin))
    assert max(bursts) > 2000


def test_mixture_follows_its_curve(rows: TrainingRows) -> None:
    """The source ids of the rows follow the weights, evaluated at r * T tokens, within one row."""
    taken = owed = 0.0
    for r in range(600):
        ids = set(rows.row(r)["source_id"].tolist())
        assert len(ids) == 1
        taken += ids.pop()
        owed += 0.1 + 0.7 * min(r / 400, 1)
        assert abs(taken - owed) < 1


def _pairs(row: dict[str, np.ndarray]) -> list[int]:
    """(token, target) pairs that are learned, each as one number."""
    used = row["loss_mask"] > 0
    return (row["tokens"][used] * 1024 + row["targets"][used]).tolist()


def _pairs_inside(document: np.ndarray) -> list[int]:
    return (document[:-1].astype(int) * 1024 + document[1:]).tolist()


def test_an_epoch_is_every_token_once(config: DataConfig, rows: TrainingRows) -> None:
    """Over one epoch the inputs are all tokens and the (token, target) pairs all pairs inside documents; epochs differ.

    Pairs across documents would show up here, since the counts must be equal.
    """
    store = TokenStore(config.sources[0].store)
    single = TrainingRows(replace(config, sources=(replace(config.sources[0], weight=((0, 1.0),)),)), 4 * T)
    source = single.sources[0]
    documents = [store.tokens(i) for i in range(len(store))]
    tokens = Counter(token for document in documents for token in document.tolist())
    pairs = Counter(pair for document in documents for pair in _pairs_inside(document))
    orders = []
    for epoch in range(2):
        seen_tokens, seen_pairs, order = Counter(), Counter(), []
        for r in range(epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch):
            row = single.row(r)
            seen_tokens.update(row["tokens"][row["segment_ids"] > 0].tolist())
            seen_pairs.update(_pairs(row))
            order.append(row["tokens"].tobytes())
        assert seen_tokens == tokens
        assert seen_pairs == pairs
        orders.append(order)
    assert orders[0] != orders[1]


def test_rows_are_segments_of_documents(rows: TrainingRows) -> None:
    """INV-36 (what packing must supply): segments 1, 2, ... in order, positions from 0, targets inside the segment.

    Padding is segment 0 at the end, without loss.
    """
    end = rows.sources[0].store.manifest.tokenizer["end_of_text_id"]
    for r in range(300):
        row = rows.row(r)
        segments = row["segment_ids"]
        count = int(np.count_nonzero(segments))
        assert (np.diff(segments[:count]) >= 0).all()
        assert sorted(set(segments[:count].tolist())) == list(range(1, segments.max() + 1))
        assert not segments[count:].any()
        assert not row["loss_mask"][count:].any()
        for segment in range(1, segments.max() + 1):
            place = np.flatnonzero(segments == segment)
            assert row["positions"][place].tolist() == list(range(len(place)))
            assert row["targets"][place[:-1]].tolist() == row["tokens"][place[1:]].tolist()
            assert end not in row["tokens"][place[:-1]].tolist()
            last = place[-1]
            assert row["loss_mask"][last] == (row["tokens"][last] != end)


def test_document_longer_than_the_context(tmp_path: Path, store_folder: Path) -> None:
    """Bad input: one document of many rows is cut at row ends, and every next-token pair of it stays a target."""
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    config = PrepareConfig(
        inputs=(str(tmp_path / "long.txt"),),
        output=str(tmp_path / "store"),
        tokenizer=TokenizerConfig(path=str(store_folder)),
        held_out_fraction=0.0,
    )
    prepare(config, progress=False)
    store = TokenStore(tmp_path / "store")
    assert len(store) == 1
    document = store.tokens(0)
    for packing in ("concat", "best_fit"):
        data = DataConfig(sources=(SourceConfig(name="a", store=str(store.folder)),), packing=packing, window_rows=8)
        rows = TrainingRows(data, T)
        seen = Counter()
        for r in range(rows.sources[0].rows_per_epoch):
            seen.update(_pairs(rows.row(r)))
        assert seen == Counter(_pairs_inside(document))


def test_only_answers_are_learned(second_store_folder: Path) -> None:
    """With loss_roles the targets with loss are exactly the answers and their end of text."""
    source = SourceConfig(name="chat", store=str(second_store_folder))
    rows = TrainingRows(DataConfig(sources=(source,), packing="best_fit", loss_roles=("assistant",)), T)
    store = TokenStore(second_store_folder)
    learned = []
    for r in range(rows.sources[0].rows_per_epoch):
        row = rows.row(r)
        learned += row["targets"][row["loss_mask"] > 0].tolist()
        assert row["loss_mask"].sum() < 0.6 * T
    answers = store.tokenizer.decode(learned)
    expected = []
    for i in range(len(store)):
        question, answer = store.spans(i)
        assert (question[0], answer[0]) == ("user", "assistant")
        expected.append(store.tokenizer.decode(store.tokens(i)[question[1] :]))
        assert answer[1] == len(store.tokens(i))
    assert sorted(answers.split(".")) == sorted(".".join([*(text.rstrip(".") for text in expected), ""]).split("."))
    assert learned.count(store.manifest.tokenizer["end_of_text_id"]) == len(store)


def test_length_buckets(store_folder: Path) -> None:
    """A source takes the documents of its bucket only; an empty bucket is an error with the numbers."""
    lengths = TokenStore(store_folder).lengths
    middle = int(np.median(lengths))
    halves = [
        SourceConfig(name="short", store=str(store_folder), max_length=middle),
        SourceConfig(name="long", store=str(store_folder), min_length=middle),
    ]
    totals = []
    for half in halves:
        rows = SourceRows(half, DataConfig(sources=(half,), packing="best_fit"), T)
        pieces = [piece for r in range(rows.rows_per_epoch) for piece in rows.pieces(r)]
        assert {int(lengths[document]) < middle for document, _, _ in pieces} == {half.name == "short"}
        totals.append(sum(length for _, _, length in pieces))
    assert sum(totals) == lengths.sum()
    nothing = SourceConfig(name="huge", store=str(store_folder), min_length=10**9)
    with pytest.raises(DataError, match=r"'huge': none of the .* has a length in \[1000000000"):
        TrainingRows(DataConfig(sources=(nothing,)), T)


def test_fingerprint_tells_what_decides_the_rows(config: DataConfig, rows: TrainingRows) -> None:
    """Seed, packing, window, length and weights change it; where the store lies and reading workers do not."""
    other = "best_fit" if config.packing == "concat" else "concat"
    first = replace(config.sources[0], weight=((0, 0.5),))
    changed = [
        TrainingRows(replace(config, seed=1), T),
        TrainingRows(replace(config, packing=other), T),
        TrainingRows(replace(config, window_rows=16), T),
        TrainingRows(replace(config, sources=(first, config.sources[1])), T),
        TrainingRows(config, T // 2),
    ]
    assert len({rows.fingerprint, *(one.fingerprint for one in changed)}) == 6
    assert TrainingRows(replace(config, workers=2), T).fingerprint == rows.fingerprint
    assert not np.array_equal(changed[0].row(0)["tokens"], rows.row(0)["tokens"])


def test_stores_of_different_tokenizers(tmp_path: Path, corpus: Path, store_folder: Path) -> None:
    prepare(
        PrepareConfig(inputs=(str(corpus),), output=str(tmp_path / "s"), tokenizer=TokenizerConfig(vocab_size=400)),
        progress=False,
    )
    with pytest.raises(DataError, match=r"different tokenizers; prepare .* --tokenizer"):
        TrainingRows(_config(store_folder, tmp_path / "s"), T)


def test_loader_refuses_what_cannot_be_divided(rows: TrainingRows) -> None:
    with loader(rows, process_count=2) as stream, pytest.raises(ValueError, match="3 rows cannot be divided"):
        stream.next_rows(3)
    with pytest.raises(ValueError, match="process 2 of 2"):
        loader(rows, process_index=2, process_count=2)


@pytest.mark.full
def test_worker_processes_read_the_same(config: DataConfig, rows: TrainingRows) -> None:
    """grain's worker processes change nothing but who reads."""
    with loader(TrainingRows(replace(config, workers=2), T), start_row=5) as stream:
        batches = [stream.next_rows(4) for _ in range(4)]
    assert _equal(_join(batches), Batch.stack([rows.row(5 + r) for r in range(16)]))


def test_manifest_is_plain_json(store_folder: Path) -> None:
    """The manifest holds what a reader of the folder needs."""
    values = json.loads((store_folder / "manifest.json").read_text())
    assert values["license"] == "unknown"
    assert values["statistics"]["bytes_per_token"] > 1
    assert sum(values["splits"]["train"]["documents_by_length"].values()) == values["splits"]["train"]["documents"]
