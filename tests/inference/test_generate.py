"""Loading a checkpoint, and the command that continues prompts."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from mmx_jax.checkpoint import CheckpointNotFoundError
from mmx_jax.data import TokenizerError, load_tokenizer
from mmx_jax.inference import GREEDY, Generator, generate
from mmx_jax.inference.load import LoadError, find_checkpoints, load_for_inference, with_tokenizer
from tests.data.tokenizers import sentencepiece_with_prefix
from tests.inference.trained import make_run

ROOT = Path(__file__).parents[2]
PROMPT = "The cache keeps 東"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def ready(trained):
    return with_tokenizer(load_for_inference(trained[0]))


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/00000012"])
def test_a_checkpoint_is_found_from_any_of_its_folders(trained, name):
    """Workdir, folder of checkpoints, or one step."""
    folder, step = find_checkpoints(trained[0] / name)
    assert folder == trained[0] / "checkpoints"
    assert step == (12 if name.endswith("12") else None)


@pytest.mark.parametrize("name", ["20261122", "00000012"])
def test_a_workdir_may_be_called_like_a_step(trained, tmp_path, name):
    """What a folder holds decides, not its name; a damaged step is still a step, an empty folder is none."""
    work = tmp_path / name
    step = work / "checkpoints" / "00000012"
    step.parent.mkdir(parents=True)
    step.symlink_to(trained[0] / "checkpoints" / "00000012")
    assert find_checkpoints(work) == (work / "checkpoints", None)
    assert find_checkpoints(step) == (work / "checkpoints", 12)
    damaged = tmp_path / "other" / "00000012"
    (damaged / "arrays").mkdir(parents=True)
    assert find_checkpoints(damaged) == (tmp_path / "other", 12)
    empty = tmp_path / "empty" / name
    empty.mkdir(parents=True)
    with pytest.raises(LoadError, match="holds no checkpoint"):
        find_checkpoints(empty)


def test_what_was_saved_is_what_is_loaded(trained, ready):
    """Weights bit for bit in fp32, the stage's RoPE base, and limits from the tokenizer."""
    _, run, params = trained
    loaded, tokenizer = ready
    for path, value in params.items():
        np.testing.assert_array_equal(loaded.params[path], value)
    assert (loaded.run, loaded.step, loaded.stage) == (run, 12, run.stages[0])
    assert loaded.model.rope_base == 500.0
    # INV-41, INV-42: the model's padded rows are barred; the tokenizer's end of text ends a generation.
    assert loaded.model.trained_vocab_size == tokenizer.vocab_size < run.model.vocab_size
    assert loaded.model.end_of_text_id == tokenizer.end_of_text_id


def test_folders_without_a_model_are_named(trained, tmp_path):
    """Missing folder, empty folder, missing step, missing tokenizer."""
    with pytest.raises(LoadError, match="no such folder"):
        load_for_inference(tmp_path / "none")
    with pytest.raises(LoadError, match="holds no checkpoint"):
        load_for_inference(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="complete steps: 12"):
        load_for_inference(trained[0], step=5)
    loaded = load_for_inference(trained[0])
    source = dataclasses.replace(loaded.stage.data.sources[0], store=str(tmp_path / "gone"))
    moved = dataclasses.replace(loaded.stage, data=dataclasses.replace(loaded.stage.data, sources=(source,)))
    with pytest.raises(TokenizerError, match="name one with --tokenizer"):
        with_tokenizer(dataclasses.replace(loaded, stage=moved))


def test_another_tokenizer_than_the_checkpoints_is_refused(ready):
    """Checkpoints hold a digest of theirs; one that is named by hand is taken all the same."""
    loaded, tokenizer = ready
    same = dataclasses.replace(loaded, metadata={**loaded.metadata, "tokenizer_sha256": tokenizer.sha256})
    assert with_tokenizer(same)[1].sha256 == tokenizer.sha256
    other = dataclasses.replace(loaded, metadata={**loaded.metadata, "tokenizer_sha256": 64 * "0"})
    with pytest.raises(LoadError, match=rf"SHA-256 {tokenizer.sha256[:12]}.* is not the tokenizer that .*0{{12}}"):
        with_tokenizer(other)
    assert with_tokenizer(other, tokenizer.file)[1].sha256 == tokenizer.sha256


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_stream_is_the_text_and_cannot_steer_the_terminal(ready):
    """UTF-8 comes out whole however its bytes are split over tokens; control characters are shown, not obeyed."""
    loaded, tokenizer = ready
    generator = Generator(loaded.model, loaded.params, slots=1)
    prompt = "\x1b[2J" + PROMPT
    ids = generator.generate([generate.encode(tokenizer, prompt)], GREEDY, 30)[0]
    plain, screen = io.StringIO(), Terminal()
    speed = generate.stream_to(plain, generator, tokenizer, prompt, GREEDY, 30)
    generate.stream_to(screen, generator, tokenizer, prompt, GREEDY, 30)
    assert plain.getvalue() == prompt + tokenizer.decode(ids) + "\n"
    assert "\x1b" not in screen.getvalue()
    assert screen.getvalue().startswith("\u241b[2JThe cache keeps 東")
    assert f"{len(ids)} tokens after a prompt of" in speed
    assert "tokens/s" in speed


@pytest.mark.parametrize(
    ("text", "shown"), [("a\tb\nc", "a\tb\nc"), ("\x07\x00", "\u2407\u2400"), ("\x9b\x7fé", "\ufffd\ufffdé")]
)
def test_printable(text, shown):
    """Newline and tab stay; other control characters become pictures."""
    assert generate.printable(text) == shown


def command(*arguments):
    """Runs the command in this process."""
    options = flags.FlagValues()
    generate.define_flags(options)
    options(["generate", *arguments])
    return generate.run(options)


def test_a_file_of_prompts(trained, ready, tmp_path, capsys):
    """Lines and .jsonl give the same continuations, on the terminal and in a file."""
    prompts = [PROMPT, "def f(x):", "x"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    settings = [f"--checkpoint={trained[0]}", "--max_new_tokens=12", "--temperature=0"]
    assert command(f"--prompts_file={tmp_path}/p.txt", *settings) == 0
    shown = capsys.readouterr()
    assert command(f"--prompts_file={tmp_path}/p.jsonl", f"--output={tmp_path}/out.jsonl", *settings) == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [record["prompt"] for record in written] == prompts
    loaded, tokenizer = ready
    ids = Generator(loaded.model, loaded.params).generate([tokenizer.encode(p) for p in prompts], GREEDY, 12)
    assert [record["continuation"] for record in written] == [tokenizer.decode(out) for out in ids]
    assert shown.out == "".join(generate.printable(r["prompt"] + r["continuation"]) + "\n\n" for r in written)
    assert "tokens/s" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--checkpoint is missing"),
        ("--checkpoint=x", "either --prompt or --prompts_file"),
        ("--checkpoint=x --prompt=a --prompts_file=b", "either --prompt or --prompts_file"),
        ("--checkpoint=x --prompt=a --output=b", "--output goes with --prompts_file"),
        ("--checkpoint=/nowhere --prompt=a", "/nowhere: no such folder"),
        ("--checkpoint=x --prompt=a --top_p=0", "top_p"),
        ("--checkpoint=x --prompts_file=/nowhere.txt", "/nowhere.txt: No such file"),
        ("--checkpoint=x --prompts_file=HERE/empty", "holds no prompt"),
        ("--checkpoint=x --prompts_file=HERE/bytes", "byte 2 is not UTF-8"),
        ("--checkpoint=x --prompts_file=HERE/lines.jsonl", "lines.jsonl:2: must be an object"),
        ("--checkpoint=WORK --prompt=", "prompt '' is empty"),
        (
            "--checkpoint=WORK --prompts_file=HERE/good --output=/nowhere/x --max_new_tokens=1",
            "there is no folder /nowhere",
        ),
        ("--checkpoint=/nowhere --prompts_file=HERE/good --output=HERE", "is a folder; name a file in it"),
        ("--checkpoint=x --prompt=a --seed=99999999999999999999", "seed"),
        ("--checkpoint=x --prompt=a --temperature=inf", "temperature"),
    ],
)
def test_the_command_says_what_is_wrong(trained, tmp_path, capsys, arguments, message):
    """One line and exit code 2, before any weight is read where that is possible."""
    contents = {"empty": b"\n \n", "bytes": b"ab\xff", "lines.jsonl": b'{"prompt": "a"}\n{"text": "b"}\n', "good": b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        command(*arguments.replace("HERE", str(tmp_path)).replace("WORK", str(trained[0])).split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_only_newlines_end_the_lines_of_a_prompt_file(tmp_path):
    """JSON strings may hold U+2028 as it is; a byte order mark and carriage returns at line ends are no text."""
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}'.encode())
    assert generate.read_prompts(str(path)) == ["a\u2028b", "c"]
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc \n".encode())
    assert generate.read_prompts(str(path)) == ["a\u2028b", "c "]


class SaysCat(Generator):
    """Stands for a generator that continues every prompt with given ids."""

    def __init__(self, ids):
        self.ids = ids

    def stream(self, prompt, sampling, limit):
        return iter(self.ids)

    def generate(self, prompts, sampling, limit):
        return [self.ids for _ in prompts]


def test_a_continuation_keeps_its_first_space(tmp_path):
    """With a tokenizer that puts a space before every text, the space between prompt and continuation is real."""
    tokenizer = load_tokenizer(sentencepiece_with_prefix(tmp_path))
    generator = SaysCat(tokenizer.encode("cat"))
    output = io.StringIO()
    generate.stream_to(output, generator, tokenizer, "the", GREEDY, 8)
    assert output.getvalue() == "the cat\n"
    assert generate.continue_all(generator, tokenizer, ["the"], GREEDY, 8)[0] == [" cat"]


def test_the_program_on_a_terminal_without_utf8(trained):
    """Characters that the terminal cannot show become question marks; nothing ends with a traceback."""
    arguments = ["--checkpoint", str(trained[0]), "--prompt", PROMPT, "--max_new_tokens", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "mmx_jax.inference.generate", *arguments],
        capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"The cache keeps ?")
    assert b"Traceback" not in done.stderr
