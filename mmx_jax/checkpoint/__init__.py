"""Checkpoints: saved behind the training loop, atomic, sharded, and verified byte for byte when read.

    with CheckpointStore("runs/a/checkpoints", keep_last=3) as store:
        store.save(step, {"params": params, "optimizer": optimizer_state}, {"tokens": tokens})
    restored = CheckpointStore("runs/a/checkpoints").restore(abstract_tree)

Format 1, one folder a step (all JSON is indented text; checksums are CRC-32 as zlib computes it, in hexadecimal):

    00001200/                           the step; while it is written: 00001200.orbax-checkpoint-tmp
      metadata.json                     {"format": 1, "step": 1200, "permanent": false, "metadata": what save was given}
      checksums.json                    {"crc32": of the next value's text, "content": {"format": 1,
                                          "metadata.json": its checksum,
                                          "arrays": {name: {"shape", "dtype", "chunk", "files": {file: checksum}}}}}
      arrays/params.scan.0.qkv/         one array: the leaf with key path params, scan/0/qkv; "/" becomes "."
        zarr.json                       zarr 3 metadata, for any zarr reader; no compression, no shards
        c.0.0  c.0.1                    chunks (0, 0), (0, 1): their elements, C order, little endian; a scalar's is c
      _CHECKPOINT_METADATA, commit_success.txt      written by Orbax, not needed to read

Chunks divide the array's shape, so a chunk file's bytes are the chunk's elements and nothing else. A save cuts every
device shard into chunks of at most 128 MiB; a reader takes any chunk shape. Which file has which bytes is known to
`checksums.json` alone, which is written after all arrays and before the folder gets its name; so a file that is
changed, cut, missing or exchanged is noticed by whoever reads that chunk, on any mesh, without reading another.

Another writer of this layout (an import of weights) uses `layout`: `ArrayRecord` with the chunk shape it likes (say one
source tensor, (1, 1, 1, D, F) of a stack [groups, run, E, D, F]), `create_array`, `open_for_chunks`, `write_chunk` from
any thread or process, then `write_metadata` and `write_checksums` in a folder with a temporary name, and a rename.

`python -m mmx_jax.checkpoint list FOLDER` and `... verify FOLDER [--step N]` look at a folder from the shell.
"""

from mmx_jax.checkpoint.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    Problem,
)
from mmx_jax.checkpoint.store import CheckpointStore, Restored

__all__ = [
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "CheckpointStore",
    "CheckpointWriteError",
    "Problem",
    "Restored",
]
