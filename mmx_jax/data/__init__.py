"""From text to batches: documents -> tokens -> token store -> mixture -> packing -> the rows of a process.

`prepare` is in `mmx_jax.data.prepare`, which is also a command.
"""

from mmx_jax.data.baselines import Baselines, baselines
from mmx_jax.data.batch import Batch
from mmx_jax.data.errors import DataError, StoreError, TokenizerError
from mmx_jax.data.held_out import HeldOutBatches, held_out_batches
from mmx_jax.data.pipeline import RowLoader, TrainingRows, loader
from mmx_jax.data.store import Manifest, TokenStore, check_store_vocabulary, verify
from mmx_jax.data.tokenizer import StreamDecoder, Tokenizer, check_vocabulary, load_tokenizer, train_tokenizer

__all__ = [
    "Baselines",
    "Batch",
    "DataError",
    "HeldOutBatches",
    "Manifest",
    "RowLoader",
    "StoreError",
    "StreamDecoder",
    "TokenStore",
    "Tokenizer",
    "TokenizerError",
    "TrainingRows",
    "baselines",
    "check_store_vocabulary",
    "check_vocabulary",
    "held_out_batches",
    "load_tokenizer",
    "loader",
    "train_tokenizer",
    "verify",
]
