"""The token store: documents as tokens on disk, memory-mapped, with O(1) access to any of them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt16, UInt32

from mmx_jax.data.errors import StoreError, TokenizerError
from mmx_jax.data.shards import SPLITS, token_dtype, write_json
from mmx_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds; written last, so that a store with a manifest is whole."""

    format: int
    license: str
    request: dict[str, Any]
    """The configuration it was prepared from."""
    tokenizer: dict[str, Any]
    """file, sha256, vocab_size, end_of_text_id."""
    splits: dict[str, dict[str, Any]]
    """Per split: documents, tokens, bytes, documents_by_length (key 2^i: from 2^i tokens on), and the shards with sizes
    and SHA-256 of every file."""
    statistics: dict[str, Any]
    """Of the whole corpus: documents, tokens, bytes, bytes_per_token, files; what was replaced, skipped, removed."""

    @property
    def fingerprint(self) -> str:
        """Digest of the contents: tokenizer and every shard; not of where the text came from."""
        contents = [self.format, self.tokenizer, self.splits]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes the manifest atomically."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Reads a store's manifest.

        Raises:
          StoreError: there is none, or it is of another format.
        """
        path = Path(folder) / MANIFEST
        try:
            values = json.loads(path.read_text())
            manifest = cls(**values)
        except FileNotFoundError:
            raise StoreError(
                f"{folder}: no token store here (no {MANIFEST}); prepare one with python -m mmx_jax.data.prepare"
            ) from None
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: not a manifest ({error}); delete the folder and prepare it again") from error
        if manifest.format != FORMAT:
            raise StoreError(f"{path}: format {manifest.format}, this code reads {FORMAT}; prepare the store again")
        return manifest


class _Shard:
    """The files of one split of one shard, mapped on first use."""

    def __init__(self, folder: Path, entry: dict[str, Any], dtype: np.dtype) -> None:
        self._folder = folder
        self._entry = entry
        self._dtype = dtype
        self.roles: list[str] = entry["roles"]

    def _map(self, kind: str, dtype: Any) -> np.ndarray:
        return np.memmap(self._folder / f"{self._entry['stem']}.{kind}", dtype, "r")

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._map("tokens", self._dtype)

    @cached_property
    def index(self) -> np.ndarray:
        return self._map("index", "<i8").reshape(-1, 3)

    @cached_property
    def spans(self) -> np.ndarray:
        return self._map("spans", "<i8").reshape(-1, 2)

    def bounds(self, document: int, column: int) -> tuple[int, int]:
        """Where a document begins and ends in its tokens (column 0) or spans (column 2)."""
        return int(self.index[document - 1, column]) if document else 0, int(self.index[document, column])


class TokenStore:
    """One split of a token store.

    Opening it compares the size of every file with the manifest; `verify` compares contents too.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        """Opens a store.

        Args:
          folder: the store.
          split: "train" or "held_out".

        Raises:
          StoreError: no store, or a file that is missing or of another size.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} must be one of {', '.join(map(repr, SPLITS))}")
        self.folder = Path(folder)
        self.split = split
        self.manifest = Manifest.read(folder)
        if problems := _check_sizes(self.folder, self.manifest, split):
            raise StoreError(f"{folder}: damaged store: {'; '.join(problems)}; delete it and prepare it again")
        entries = self.manifest.splits[split]["shards"]
        dtype = token_dtype(self.manifest.tokenizer["vocab_size"])
        self._shards = [_Shard(self.folder / "shards", entry, dtype) for entry in entries]
        self._starts = np.cumsum([0, *(entry["documents"] for entry in entries)])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, self.split)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Digest of the contents of all splits."""
        return self.manifest.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens are ids of."""
        return load_tokenizer(self.folder)

    @cached_property
    def lengths(self) -> Int64[np.ndarray, "documents"]:
        """Tokens of every document, end of text included."""
        return self._column(lambda shard: np.diff(shard.index[:, 0], prepend=0))

    @cached_property
    def byte_lengths(self) -> Int64[np.ndarray, "documents"]:
        """UTF-8 bytes of every document."""
        return self._column(lambda shard: shard.index[:, 1])

    def _column(self, read: Any) -> Int64[np.ndarray, "documents"]:
        return np.concatenate([np.empty(0, np.int64), *(read(shard) for shard in self._shards)])

    def _find(self, document: int) -> tuple[_Shard, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"{self.folder}: document {document} is outside 0 .. {len(self) - 1} of {self.split!r}")
        shard = int(np.searchsorted(self._starts, document, "right")) - 1
        return self._shards[shard], document - int(self._starts[shard])

    def tokens(self, document: int) -> UInt16[np.ndarray, "n"] | UInt32[np.ndarray, "n"]:
        """Tokens of a document, end of text last; a read-only view of the file."""
        shard, local = self._find(document)
        start, stop = shard.bounds(local, 0)
        return shard.tokens[start:stop]

    def bytes(self, document: int) -> int:
        """UTF-8 bytes of a document's text."""
        shard, local = self._find(document)
        return int(shard.index[local, 1])

    def spans(self, document: int) -> list[tuple[str, int]]:
        """(role, end in tokens) of a document's spans, the last of which ends with the document; [] if it is plain."""
        shard, local = self._find(document)
        start, stop = shard.bounds(local, 2)
        return [(shard.roles[role], int(end)) for end, role in shard.spans[start:stop]] if start < stop else []


def _check_sizes(folder: Path, manifest: Manifest, split: str) -> list[str]:
    problems = []
    for name, size, _ in _files(manifest, split):
        path = folder / "shards" / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problems.append(f"{path} {'is missing' if found is None else f'has {found} bytes'}, expected {size} bytes")
    return problems


def _files(manifest: Manifest, split: str) -> list[tuple[str, int, str]]:
    """(file name, bytes, SHA-256) of a split."""
    return [
        (f"{shard['stem']}.{kind}", file["bytes"], file["sha256"])
        for shard in manifest.splits[split]["shards"]
        for kind, file in shard["files"].items()
    ]


def verify(folder: str | Path) -> list[str]:
    """Reads every file of a store and compares it with the manifest's SHA-256.

    Returns:
      Problems, each naming a file; empty if the store is sound.

    Raises:
      StoreError: no store.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    expected = [(folder / manifest.tokenizer["file"], manifest.tokenizer["sha256"])]
    problems = []
    for split in SPLITS:
        problems += _check_sizes(folder, manifest, split)
        expected += [(folder / "shards" / name, digest) for name, _, digest in _files(manifest, split)]
    damaged = {problem.split(" ")[0] for problem in problems}
    for path, digest in expected:
        if str(path) in damaged:
            continue
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                problems.append(f"{path}: contents differ from the manifest's SHA-256")
    return problems


def check_store_vocabulary(store: TokenStore, model_vocab_size: int, trained_with: Tokenizer | None = None) -> None:
    """Checks that a model fits the tokenizer of a store.

    Args:
      store: the store.
      model_vocab_size: rows of the embedding.
      trained_with: the tokenizer that the model was trained with; None compares sizes only.

    Raises:
      TokenizerError: the sizes do not fit, or the store has another tokenizer.
    """
    of_store = store.manifest.tokenizer
    check_vocabulary(of_store["vocab_size"], model_vocab_size, f"the tokenizer of {store.folder}")
    if trained_with is not None and trained_with.sha256 != of_store["sha256"]:
        raise TokenizerError(
            f"{store.folder}: its tokenizer (SHA-256 {of_store['sha256'][:12]}...) is not the model's "
            f"({trained_with.file}, {trained_with.sha256[:12]}...): its ids mean other text. Prepare the store again "
            f"with --tokenizer={trained_with.file}"
        )
