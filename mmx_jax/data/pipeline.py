"""The global stream of training rows, and its loading by any number of processes.

Row r is a pure function of (the stores' manifests, the data configuration, T, r). Nothing depends on the processes, on
threads, or on the rows read before; the position in the stream is the integer r.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import pairwise
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int64

from mmx_jax.config import DataConfig, SourceConfig
from mmx_jax.data.batch import Batch
from mmx_jax.data.errors import DataError
from mmx_jax.data.mixture import Mixture
from mmx_jax.data.packing import PACKERS, Plan, cut
from mmx_jax.data.rows import Row, build_row
from mmx_jax.data.shuffle import fold, permutation
from mmx_jax.data.store import TokenStore

STREAM_VERSION = 1
"""Changes whenever the same configuration gives other rows."""
UNITS_PER_WINDOW = 16
CACHED_PLANS = 2
READ_AHEAD_BYTES = 1 << 30


class SourceRows:
    """The endless stream of rows of one source: epoch after epoch over its documents.

    Documents are shuffled once (long ones in units of a sixteenth of a window, so that one book does not fill a window)
    and divided into windows of about `window_rows` rows. A window is packed by itself, so that the number of its rows
    is the same in every epoch; an epoch orders the windows, the documents in each and its rows anew.
    """

    def __init__(self, source: SourceConfig, data: DataConfig, sequence_length: int) -> None:
        self.store = TokenStore(source.store)
        self._data = data
        self._sequence_length = sequence_length
        self._key = fold(
            data.seed, int.from_bytes(hashlib.blake2b(source.name.encode(), digest_size=8).digest(), "big")
        )
        self._pack = PACKERS[data.packing]
        lengths = self.store.lengths
        longest = np.inf if source.max_length is None else source.max_length
        documents = np.flatnonzero((lengths >= source.min_length) & (lengths < longest))
        if not len(documents):
            raise DataError(
                f"source {source.name!r}: none of the {len(self.store)} training documents of {source.store} has a "
                f"length in [{source.min_length}, {source.max_length}) tokens; change min_length or max_length"
            )
        per_unit = max(1, data.window_rows // UNITS_PER_WINDOW) if data.packing == "concat" else 1
        document, start, length = cut(lengths[documents], per_unit * sequence_length)
        order = permutation(len(document), self._key, 0)
        self._document = documents[document[order]]
        self._start, self._length = start[order], length[order]
        before = np.cumsum(self._length) - self._length
        windows = before // (data.window_rows * sequence_length)
        self._bounds = np.append(np.flatnonzero(np.diff(windows, prepend=-1)), len(windows))
        self._rows_of_window = self._count_rows()
        self.rows_per_epoch = int(self._rows_of_window.sum())
        self._lock = threading.Lock()
        self._epoch = lru_cache(maxsize=2)(self._order_epoch)
        self._plan = lru_cache(maxsize=CACHED_PLANS)(self._plan_window)

    def _count_rows(self) -> Int64[np.ndarray, "windows"]:
        if self._data.packing == "concat":
            totals = np.add.reduceat(self._length, self._bounds[:-1])
            return -(-totals // self._sequence_length)
        # How many rows best-fit decreasing needs depends on the lengths, not on their order.
        windows = pairwise(self._bounds.tolist())
        return np.array(
            [self._pack(self._length[low:high], self._sequence_length).rows for low, high in windows], np.int64
        )

    def _order_epoch(self, epoch: int) -> tuple[Int64[np.ndarray, "windows"], Int64[np.ndarray, "windows"]]:
        """Windows in the epoch's order, and how many rows end with each."""
        order = permutation(len(self._rows_of_window), self._key, 1, epoch)
        return order, np.cumsum(self._rows_of_window[order])

    def _plan_window(
        self, epoch: int, window: int
    ) -> tuple[Plan, Int64[np.ndarray, "units"], Int64[np.ndarray, "rows"]]:
        low, high = int(self._bounds[window]), int(self._bounds[window + 1])
        units = low + permutation(high - low, self._key, 2, epoch, window)
        plan = self._pack(self._length[units], self._sequence_length)
        return plan, units, permutation(plan.rows, self._key, 3, epoch, window)

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of the pieces in row `number` of this source."""
        epoch, place = divmod(number, self.rows_per_epoch)
        with self._lock:
            windows, ends = self._epoch(epoch)
            position = int(np.searchsorted(ends, place, "right"))
            window = int(windows[position])
            plan, units, rows = self._plan(epoch, window)
        row = int(rows[place - (int(ends[position]) - plan.rows)])
        pieces = slice(int(plan.row_starts[row]), int(plan.row_starts[row + 1]))
        unit = units[plan.unit[pieces]]
        start = self._start[unit] + plan.start[pieces]
        return list(zip(self._document[unit].tolist(), start.tolist(), plan.length[pieces].tolist(), strict=True))


class TrainingRows:
    """The global stream of training rows, with random access; endless."""

    def __init__(self, config: DataConfig, sequence_length: int) -> None:
        """Opens the stores and plans.

        Args:
          config: sources, weights, packing, seed.
          sequence_length: T.

        Raises:
          DataError: a store is missing or damaged, stores have different tokenizers, or no document of a source fits.
          ConfigError: all weights are zero somewhere.
        """
        self.config = config
        self.sequence_length = sequence_length
        self.sources = [SourceRows(source, config, sequence_length) for source in config.sources]
        self.mixture = Mixture([source.weight for source in config.sources], sequence_length)
        for source in self.sources[1:]:
            first, other = self.sources[0].store, source.store
            if other.manifest.tokenizer["sha256"] != first.manifest.tokenizer["sha256"]:
                raise DataError(
                    f"{other.folder} and {first.folder} were prepared with different tokenizers; prepare one of "
                    f"them with --tokenizer {first.folder}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingRows, (self.config, self.sequence_length)

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the tokenizer that all sources share."""
        return self.sources[0].store.manifest.tokenizer["vocab_size"]

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of the tokenizer file that all sources share."""
        return self.sources[0].store.manifest.tokenizer["sha256"]

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides the rows: two streams of the same fingerprint are equal."""
        sources = [
            asdict(config) | {"store": rows.store.fingerprint}
            for config, rows in zip(self.config.sources, self.sources)
        ]
        config = self.config
        decides = [
            STREAM_VERSION,
            self.sequence_length,
            config.packing,
            config.window_rows,
            config.seed,
            config.loss_roles,
        ]
        return hashlib.sha256(json.dumps([decides, sources], sort_keys=True).encode()).hexdigest()

    def row(self, row: int) -> Row:
        """Row `row` of the global stream, as `Batch` fields of shape [T]."""
        source, number = self.mixture.row(row)
        rows = self.sources[source]
        return build_row(
            rows.store,
            rows.pieces(number),
            self.sequence_length,
            source_id=source,
            loss_roles=self.config.loss_roles,
        )


Places = Callable[[int], Sequence[int]]
"""From the number of global rows of a step to those that this process reads, counted from the step's first."""


class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows of one process when every step takes `per_step` global rows, of which it reads those at `places`."""

    def __init__(self, rows: TrainingRows, start_row: int, per_step: int, places: Sequence[int]) -> None:
        self._rows = rows
        self._places = places
        self._start_row = start_row
        self._per_step = per_step

    def __len__(self) -> int:
        return 1 << 48

    def __getitem__(self, index: Any) -> Row:
        step, number = divmod(int(index), len(self._places))
        return self._rows.row(self._start_row + step * self._per_step + self._places[number])


class RowLoader:
    """Reads the global stream ahead of training; `loader` makes one.

    `row` is the next global row: together with the stream's fingerprint it is all the state there is.
    """

    def __init__(self, rows: TrainingRows, start_row: int, places: Places) -> None:
        self.rows = rows
        self.row = start_row
        self._places = places
        self._per_step = 0
        self._iterator: grain.DatasetIterator | None = None

    def next_rows(self, count: int) -> Batch:
        """This process's slice of the next `count` global rows.

        Read-ahead supposes that the next steps take as many; when `count` changes it starts anew at the same row.

        Args:
          count: global rows of the step.

        Returns:
          Batch of numpy arrays [rows of this process, T].

        Raises:
          ValueError: so many rows cannot be divided among the processes.
        """
        places = self._places(count)
        if count != self._per_step or self._iterator is None:
            self.close()
            self._per_step = count
            self._iterator = self._open(count, places)
        batch = Batch.stack([next(self._iterator) for _ in places])
        self.row += count
        return batch

    def _open(self, per_step: int, places: Sequence[int]) -> grain.DatasetIterator:
        source = _ProcessRows(self.rows, self.row, per_step, places)
        row_bytes = 6 * 4 * self.rows.sequence_length
        ahead = max(1, min(2 * len(places), READ_AHEAD_BYTES // row_bytes))
        dataset = grain.MapDataset.source(source).to_iter_dataset(
            grain.ReadOptions(num_threads=min(ahead, 4), prefetch_buffer_size=ahead)
        )
        if workers := self.rows.config.workers:
            if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags, which only absl programs parse
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
            )
        return iter(dataset)

    def close(self) -> None:
        """Ends the read-ahead; the next call of `next_rows` starts it again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "RowLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def loader(
    rows: TrainingRows,
    *,
    start_row: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    places: Sequence[int] | None = None,
) -> RowLoader:
    """Loads the stream from `start_row` on.

    Args:
      rows: the global stream.
      start_row: next global row: 0, or the number that a checkpoint holds.
      process_index: which slice of every step is read.
      process_count: into how many slices a step is divided.
      places: instead of a slice, which rows of each step are read, counted from the step's first; ascending.

    Raises:
      ValueError: the numbers make no sense.
    """
    if start_row < 0 or not 0 <= process_index < process_count:
        raise ValueError(f"start_row {start_row}, process {process_index} of {process_count}: out of range")

    def of_slice(count: int) -> Sequence[int]:
        if count <= 0 or count % process_count:
            raise ValueError(f"{count} rows cannot be divided among {process_count} processes")
        mine = count // process_count
        return range(process_index * mine, (process_index + 1) * mine)

    def given(count: int) -> Sequence[int]:
        assert places is not None
        if not places or places[-1] >= count:
            raise ValueError(f"rows {list(places)} are not all among the {count} of a step")
        return places

    return RowLoader(rows, start_row, of_slice if places is None else given)
