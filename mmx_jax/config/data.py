"""What the model is trained on: where text comes from, how it becomes tokens, how tokens become batches."""

import math
from dataclasses import dataclass

from mmx_jax.config.checks import at_least, fail, one_of, seed_fits


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer to read, or to train on the corpus itself."""

    path: str | None = None
    """SentencePiece .model or Hugging Face tokenizer.json; None trains one while preparing."""
    vocab_size: int = 32_768
    """Pieces of a tokenizer to train (SentencePiece BPE with byte fallback, at most 200,000)."""
    end_of_text: str | None = None
    """Piece of a tokenizer to read that ends documents; None is the one that the tokenizer itself names."""
    training_bytes: int = 200_000_000
    """At most so many bytes of text, spread over the corpus, are used for training it."""

    def __post_init__(self) -> None:
        at_least(self, 300, "vocab_size")
        at_least(self, 1, "training_bytes")
        if self.vocab_size > 200_000:
            fail(self, "vocab_size", "must be at most 200,000")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How raw files become a token store."""

    inputs: tuple[str, ...]
    """Files, folders, globs of text, .jsonl, .parquet (also .gz, .xz, .dz); "python:stdlib" is Python's own library."""
    output: str
    """Folder of the token store."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Tokenizer to read or to train."""
    text_field: str = "text"
    """Field that holds the text of a JSONL or Parquet record; records with "spans" keep their roles."""
    include: tuple[str, ...] = ()
    """File name patterns taken from folders; empty takes every text file."""
    exclude: tuple[str, ...] = ()
    """Path patterns left out."""
    document_bytes: int | None = None
    """Longer documents become several, cut at line ends every so many bytes; None keeps them whole."""
    held_out_fraction: float = 0.05
    """Share of documents set aside by a hash of their name, never trained on."""
    deduplicate: tuple[str, ...] = ()
    """Any of "exact" and "near" (MinHash)."""
    near_threshold: float = 0.8
    """Jaccard similarity from which "near" removes the later document."""
    license: str = "unknown"
    """Licence of the text, kept in the manifest."""
    processes: int = 0
    """Tokenising processes; 0 is one per core."""

    def __post_init__(self) -> None:
        if not self.inputs:
            fail(self, "inputs", "names no input")
        if not 0 <= self.held_out_fraction < 1:
            fail(self, "held_out_fraction", "must be in [0, 1)")
        if not 0 < self.near_threshold <= 1:
            fail(self, "near_threshold", "must be in (0, 1]")
        if unknown := sorted(set(self.deduplicate) - {"exact", "near"}):
            fail(self, "deduplicate", f"holds {unknown}; allowed are 'exact' and 'near'")
        at_least(self, 0, "processes")
        at_least(self, 1024, "document_bytes")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents in the mixture."""

    name: str
    """Name in metrics and reports."""
    store: str
    """Folder of a token store."""
    weight: tuple[tuple[int, float], ...] = ((0, 1.0),)
    """Sampling weight: points (trained tokens of the run, weight), linear between points, constant outside."""
    min_length: int = 0
    """Shortest document taken, in tokens (with `max_length`: a length bucket)."""
    max_length: int | None = None
    """Documents must be shorter than this; None takes any length."""

    def __post_init__(self) -> None:
        tokens = [point[0] for point in self.weight]
        if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 0:
            fail(self, "weight", "needs points (tokens, weight) with tokens increasing from >= 0")
        if not all(0 <= weight < math.inf for _, weight in self.weight):
            fail(self, "weight", "weights must be finite and not negative")
        at_least(self, 0, "min_length")
        if self.max_length is not None and self.max_length <= self.min_length:
            fail(self, "max_length", f"must be greater than min_length = {self.min_length}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture and how it is packed into rows."""

    sources: tuple[SourceConfig, ...]
    """Sources of training documents; their stores' held-out parts are the evaluation text."""
    packing: str = "concat"
    """"concat": documents end to end, cut at row ends; "best_fit": whole documents placed where they fit best."""
    window_rows: int = 1024
    """Packing is planned over windows of so many rows of the globally shuffled document order."""
    seed: int = 0
    """Seed of the document shuffle."""
    loss_roles: tuple[str, ...] = ()
    """Roles whose tokens are learned in records with spans; empty learns all. Documents without spans count whole."""
    prepare: tuple[PrepareConfig, ...] = ()
    """Stores that are prepared at the start when they do not exist yet."""
    workers: int = 0
    """grain worker processes per training process; 0 reads in threads of the training process."""

    def __post_init__(self) -> None:
        if not self.sources:
            fail(self, "sources", "needs at least one source")
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            fail(self, "sources", f"names must differ, got {names}")
        if not any(weight for source in self.sources for _, weight in source.weight):
            fail(self, "sources", "every weight is 0: nothing would be read")
        seed_fits(self)
        one_of(self, "packing", ("concat", "best_fit"))
        at_least(self, 1, "window_rows")
        at_least(self, 0, "workers")
