"""A small real corpus: modules of Python's own library, prepared once."""

import json
import sysconfig
from pathlib import Path

import pytest

from mmx_jax.config import PrepareConfig, TokenizerConfig
from mmx_jax.data import TokenStore
from mmx_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of some sixty text files of 0 to 60 KB."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py"))[:150:3]:
        (folder / path.name).write_text(path.read_text()[:60_000])
    for i in range(12):
        (folder / f"short{i}.txt").write_text(f"Short document number {i}.\n" * (i + 1))
    return folder


@pytest.fixture(scope="session")
def store_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as a token store with 512 pieces."""
    folder = tmp_path_factory.mktemp("store") / "corpus"
    config = PrepareConfig(
        inputs=(str(corpus),),
        output=str(folder),
        tokenizer=TokenizerConfig(vocab_size=512),
        held_out_fraction=0.2,
        processes=1,
    )
    prepare(config, progress=False)
    return folder


@pytest.fixture(scope="session")
def second_store_folder(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another store with the same tokenizer: chat records with roles."""
    base = tmp_path_factory.mktemp("second")
    with open(base / "chat.jsonl", "w") as file:
        for i in range(300):
            question = {"role": "user", "text": f"What is {i} plus {i}?"}
            answer = {"role": "assistant", "text": f"{2 * i}."}
            file.write(json.dumps({"spans": [question, answer]}) + "\n")
    config = PrepareConfig(
        inputs=(str(base / "chat.jsonl"),),
        output=str(base / "store"),
        tokenizer=TokenizerConfig(path=str(store_folder)),
        processes=1,
    )
    prepare(config, progress=False)
    return base / "store"


@pytest.fixture(scope="session")
def store(store_folder: Path) -> TokenStore:
    return TokenStore(store_folder)
