"""Duplicates: exact ones always, near ones by similarity, and a report of each."""

import json
import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.config import PrepareConfig, TokenizerConfig
from mmx_jax.data.duplicates import _shingles
from mmx_jax.data.prepare import prepare

WORDS = [f"word{i}" for i in range(3000)]


def _documents() -> dict[str, str]:
    """Twenty unrelated texts, two exact copies, one text with 1 % and one with 60 % of its words changed."""
    rng = random.Random(0)
    texts = {f"a{i:02d}": " ".join(rng.choices(WORDS, k=600)) for i in range(20)}
    texts["b-copy"] = texts["a03"]
    texts["b-copy-again"] = texts["a03"]
    for name, share in {"b-near": 0.01, "b-far": 0.6}.items():
        words = texts["a07"].split()
        for place in rng.sample(range(len(words)), int(share * len(words))):
            words[place] = rng.choice(WORDS)
        texts[name] = " ".join(words)
    texts["b-other-role"] = texts["a05"]
    return texts


def test_removal_and_report(tmp_path: Path, store_folder: Path) -> None:
    """The first stays, copies and near copies go with a reason, everything else is kept."""
    with open(tmp_path / "r.jsonl", "w") as file:
        offsets = {}
        for name, text in _documents().items():
            offsets[f"r.jsonl#{file.tell()}"] = name
            record = {"spans": [{"role": "user", "text": text}]} if name == "b-other-role" else {"text": text}
            file.write(json.dumps(record) + "\n")
    for kinds, expected in {
        ("exact",): [("b-copy", "a03", "exact"), ("b-copy-again", "a03", "exact")],
        ("exact", "near"): [
            ("b-copy", "a03", "exact"),
            ("b-copy-again", "a03", "exact"),
            ("b-near", "a07", "near"),
            ("b-other-role", "a05", "near"),
        ],
        ("near",): [
            ("b-copy", "a03", "near"),
            ("b-copy-again", "a03", "near"),
            ("b-near", "a07", "near"),
            ("b-other-role", "a05", "near"),
        ],
    }.items():
        folder = tmp_path / "-".join(kinds)
        manifest = prepare(
            PrepareConfig(
                inputs=(str(tmp_path / "r.jsonl"),),
                output=str(folder),
                tokenizer=TokenizerConfig(path=str(store_folder)),
                deduplicate=kinds,
            ),
            progress=False,
        )
        lines = [json.loads(line) for line in (folder / "duplicates.jsonl").read_text().splitlines()]
        assert [(offsets[x["removed"]], offsets[x["kept"]], x["kind"]) for x in lines] == expected
        assert all(x["similarity"] >= 0.8 for x in lines if x["kind"] == "near")
        assert manifest.statistics["duplicates_removed"] == len(expected)
        assert manifest.statistics["documents"] == 25 - len(expected)


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n", max_size=80), st.integers(1, 9))
def test_shingles_do_not_depend_on_chunks(text: str, size: int) -> None:
    """The set of shingles is that of the words, however the text is streamed; equal sets for equal words."""
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    streamed = {value for values in _shingles(iter(chunks)) for value in values}
    assert streamed == {value for values in _shingles(iter([" ".join(text.split())])) for value in values}
    words = text.split()
    distinct = {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()
    assert len(streamed) == len(distinct)
