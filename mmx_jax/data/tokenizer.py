"""Text to token ids and back: SentencePiece models and Hugging Face tokenizer.json behind one class.

Decoding goes through a table of the bytes of every piece, so that it is exact, incremental and the same for both kinds.
Tokenizers trained here are lossless on any UTF-8 text.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int32, UInt32

from mmx_jax.config import TokenizerConfig
from mmx_jax.data.errors import DataError, TokenizerError

SPACE_MARK = "\u2581"
FILE_NAMES = ("tokenizer.model", "tokenizer.json")
END_OF_TEXT_PIECE = "<|end_of_text|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT_PIECE,
    "<|endoftext|>",
    "<end_of_sentence>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
CHUNK_CHARACTERS = 1 << 16
_LINE_START = re.compile(r"\n(?=\S)")

Encode = Callable[[str, bool], list[int]]


class StreamDecoder:
    """Decodes ids one by one; text comes out as soon as its UTF-8 bytes are whole."""

    def __init__(self, tokenizer: "Tokenizer", continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.prefix_space and not continuation

    def push(self, token: SupportsIndex) -> str:
        """Text that `token` completes; bytes of an unfinished character wait for the next call."""
        data = self._tokenizer.bytes_of(token)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left at the end: a replacement character if the last character never became whole."""
        return self._utf8.decode(b"", True)


class Tokenizer:
    """A tokenizer read from a file; `load_tokenizer` makes one."""

    def __init__(
        self,
        *,
        file: Path,
        encode: Encode,
        pieces: list[bytes],
        end_of_text: str,
        end_of_text_id: int,
        prefix_space: bool,
    ) -> None:
        self.file = file
        self.end_of_text = end_of_text
        self.end_of_text_id = end_of_text_id
        self.prefix_space = prefix_space
        self._encode = encode
        self._pieces = pieces

    @property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return len(self._pieces)

    @cached_property
    def piece_bytes(self) -> Int32[np.ndarray, "V"]:
        """UTF-8 bytes of every piece; 0 for control ids such as end of text."""
        return np.array([len(piece) for piece in self._pieces], np.int32)

    @cached_property
    def sha256(self) -> str:
        """Digest of the tokenizer file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def bytes_of(self, token: SupportsIndex) -> bytes:
        """UTF-8 bytes of one piece.

        Raises:
          TokenizerError: the id is outside the vocabulary.
        """
        index = token.__index__()
        if not 0 <= index < len(self._pieces):
            raise TokenizerError(f"{self.file}: token id {index} is outside 0 .. {len(self._pieces) - 1}")
        return self._pieces[index]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without end of text.

        Args:
          text: any text.
          special: reads names of control tokens in a tokenizer.json's text as these tokens (chat templates); else
            they are ordinary text, so that data cannot forge them.
        """
        return self._encode(text, special)

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[tuple[UInt32[np.ndarray, "n"], int]]:
        """Ids of the text that the chunks form, and how many UTF-8 bytes they stand for, in bounded memory.

        Text is encoded in runs of at most 65,536 characters. A run ends before a line that starts with a visible
        character, else before white space, else anywhere: only in the last case (one word of more than 32,768
        characters) can the ids differ from those of the text encoded whole. How the text is cut into chunks has no
        influence.
        """
        buffer = ""
        for chunk in chunks:
            buffer += chunk
            start = 0
            while len(buffer) - start > CHUNK_CHARACTERS:
                stop = _cut(buffer, start)
                yield self._run(buffer[start:stop])
                start = stop
            buffer = buffer[start:]
        if buffer:
            yield self._run(buffer)

    def _run(self, text: str) -> tuple[UInt32[np.ndarray, "n"], int]:
        return np.array(self._encode(text, False), np.uint32), len(text.encode())

    def decode_bytes(self, ids: Iterable[SupportsIndex], *, continuation: bool = False) -> bytes:
        """Bytes of the pieces, one after the other; `continuation` as in `stream_decoder`."""
        indices = [token.__index__() for token in ids]
        for extreme in (min(indices), max(indices)) if indices else ():
            self.bytes_of(extreme)  # raises if it is outside the vocabulary
        data = b"".join([self._pieces[index] for index in indices])
        return data.removeprefix(b" ") if self.prefix_space and not continuation else data

    def decode(self, ids: Iterable[SupportsIndex], *, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD; `continuation` as in `stream_decoder`."""
        return self.decode_bytes(ids, continuation=continuation).decode("utf-8", "replace")

    def stream_decoder(self, *, continuation: bool = False) -> StreamDecoder:
        """A fresh incremental decoder.

        Args:
          continuation: the ids continue a text (a prompt), so that a space which some tokenizers put before every text
            is a real one.
        """
        return StreamDecoder(self, continuation)

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer into `folder`, where `load_tokenizer(folder)` finds it."""
        name = "tokenizer.json" if self.file.suffix == ".json" else "tokenizer.model"
        (Path(folder) / name).write_bytes(self.file.read_bytes())
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": self.end_of_text}) + "\n")


def _cut(text: str, start: int) -> int:
    """Where a run of `encode_chunks` that starts at `start` ends."""
    low, high = start + CHUNK_CHARACTERS // 2, start + CHUNK_CHARACTERS
    lines = [match.end() for match in _LINE_START.finditer(text, low, high)]
    if lines:
        return lines[-1]
    spaces = [match.start() + 1 for match in re.finditer(r"\S(?=\s)", text[low:high])]
    return low + spaces[-1] if spaces else high


def load_tokenizer(path: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: SentencePiece .model, Hugging Face tokenizer.json, or a folder (a token store) that holds one of them.
      end_of_text: the piece that ends documents; None takes the model's own end-of-sentence piece, then
        tokenizer_config.json's eos_token beside the file, then the usual names.

    Raises:
      TokenizerError: no such file, a kind that is not understood, or no end-of-text piece.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path}: holds neither {' nor '.join(FILE_NAMES)}")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer file")
    config = path.with_name("tokenizer_config.json")
    if end_of_text is None and config.is_file():
        end_of_text = _configured_end_of_text(config)
    return (_load_json if path.suffix == ".json" else _load_sentencepiece)(path, end_of_text)


def _configured_end_of_text(path: Path) -> str | None:
    """eos_token of a tokenizer_config.json, which is a string or an object with the field "content"."""
    try:
        description = json.loads(path.read_bytes())
        if not isinstance(description, dict):
            raise ValueError("it must hold one JSON object")
        name = description.get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str | None):
            raise ValueError(f"eos_token is {name!r}; it must be a text")
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path}: no tokenizer configuration ({error}); mend it, or delete it and name the end of text in "
            "tokenizer.end_of_text"
        ) from error
    return name


def _adds_space(letter: list[str], path: Path) -> bool:
    """Whether a space comes before the first letter of a text, by the pieces of the text "a"."""
    if not letter:
        raise TokenizerError(f"{path}: has no piece for the letter 'a', so text is lost; take a tokenizer for all text")
    return letter[0].startswith(SPACE_MARK)


def _load_sentencepiece(path: Path, end_of_text: str | None) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: not a SentencePiece model ({error})") from error
    pieces = []
    for token in range(processor.GetPieceSize()):
        if processor.IsControl(token) or processor.IsUnused(token):
            pieces.append(b"")
        elif processor.IsByte(token):
            pieces.append(bytes([int(processor.IdToPiece(token)[3:5], 16)]))
        elif processor.IsUnknown(token):
            pieces.append("\ufffd".encode())
        else:
            pieces.append(processor.IdToPiece(token).replace(SPACE_MARK, " ").encode())
    if end_of_text is None:
        eos = processor.eos_id()
    else:
        eos = processor.PieceToId(end_of_text)
        eos = eos if processor.IdToPiece(eos) == end_of_text else -1
    if eos < 0:
        raise TokenizerError(f"{path}: has no end-of-text piece {end_of_text or ''}; name one in tokenizer.end_of_text")
    prefix_space = _adds_space(processor.EncodeAsPieces("a"), path)
    # SentencePiece writes a space as U+2581 and so cannot tell the two apart; the mark itself goes in as bytes.
    mark = [processor.PieceToId(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    spell_mark = all(processor.IsByte(token) for token in mark) and not prefix_space

    def encode(text: str, special: bool) -> list[int]:
        if not spell_mark or SPACE_MARK not in text:
            return processor.EncodeAsIds(text)
        first, *others = (processor.EncodeAsIds(part) for part in text.split(SPACE_MARK))
        return first + [token for part in others for token in (*mark, *part)]

    return Tokenizer(
        file=path,
        encode=encode,
        pieces=pieces,
        end_of_text=processor.IdToPiece(eos),
        end_of_text_id=eos,
        prefix_space=prefix_space,
    )


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    return bytes(alphabet[character] for character in piece)


def _marked_bytes(piece: str) -> bytes:
    """Bytes of a SentencePiece-like piece: "<0x0A>" is a byte, U+2581 a space."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _load_json(path: Path, end_of_text: str | None) -> Tokenizer:
    try:
        description = json.loads(path.read_bytes())
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json ({error})") from error
    decoder = description.get("decoder") or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level_bytes
    elif kinds & {"ByteFallback", "Metaspace"}:
        to_bytes = _marked_bytes
    else:
        raise TokenizerError(f"{path}: decoder {sorted(kinds)} is neither byte-level nor SentencePiece-like")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, token in vocabulary.items():
        if token not in added:
            pieces[token] = to_bytes(piece)
        elif not added[token].special:
            pieces[token] = piece.encode()
    names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
    name = next((name for name in names if name in vocabulary), None)
    if name is None:
        raise TokenizerError(f"{path}: has none of {', '.join(names)}; name its end of text in tokenizer.end_of_text")
    pieces[vocabulary[name]] = b""

    def encode(text: str, special: bool) -> list[int]:
        backend.encode_special_tokens = not special
        return backend.encode(text, add_special_tokens=False).ids

    prefix_space = _adds_space(backend.encode("a", add_special_tokens=False).tokens, path)
    return Tokenizer(
        file=path,
        encode=encode,
        pieces=pieces,
        end_of_text=name,
        end_of_text_id=vocabulary[name],
        prefix_space=prefix_space,
    )


def train_tokenizer(texts: Iterable[str], path: str | Path, config: TokenizerConfig) -> Tokenizer:
    """Trains a lossless SentencePiece BPE with byte fallback and reads it back.

    Args:
      texts: training text, in pieces of any size; lines are the training sentences, carriage returns are dropped here
        (and only here).
      path: the .model file to write.
      config: the vocabulary size.

    Raises:
      TokenizerError: the text is too small for the vocabulary.
      DataError: whatever `texts` raised.
    """
    failures: list[DataError] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from _training_lines(text)
        except DataError as error:  # SentencePiece wraps what its iterator raises, and so would blame the tokenizer
            failures.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_prefix=str(Path(path).with_suffix("")),
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=1 << 17,
            bos_id=-1,
            pad_id=-1,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT_PIECE,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if failures:
            raise failures[0] from None
        raise TokenizerError(
            f"cannot train a tokenizer of {config.vocab_size} pieces on this text ({error}); "
            "give more text or a smaller tokenizer.vocab_size"
        ) from error
    return load_tokenizer(path)


def _training_lines(text: str) -> Iterator[str]:
    for line in text.replace("\r", "").split("\n"):
        for start in range(0, len(line), 8192):
            yield line[start : start + 8192]


def check_vocabulary(vocab_size: int, model_vocab_size: int, where: str = "tokenizer") -> None:
    """Checks that a model's embedding fits a tokenizer: at least as many rows, at most padded to a multiple of 256.

    Raises:
      TokenizerError: the sizes do not fit.
    """
    padded = -(-vocab_size // 256) * 256
    if not vocab_size <= model_vocab_size <= padded:
        raise TokenizerError(
            f"{where} has {vocab_size} ids, the model's vocab_size is {model_vocab_size}: "
            f"set model.vocab_size to {vocab_size} (up to {padded} pads it), or take another tokenizer"
        )
