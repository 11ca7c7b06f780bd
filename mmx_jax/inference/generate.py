"""Continues prompts with a trained model.

    python -m mmx_jax.inference.generate --checkpoint runs/quickstart --prompt "def main("
    python -m mmx_jax.inference.generate --checkpoint runs/quickstart --prompts_file prompts.txt --temperature 0
    python -m mmx_jax.inference.generate --checkpoint runs/quickstart --prompts_file prompts.jsonl --output out.jsonl

One prompt streams to the terminal. A file holds one prompt a line, or objects with the field "prompt" when its name
ends in .jsonl; its prompts run together, and --output collects {"prompt", "continuation"} lines.
"""

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from absl import app, flags

from mmx_jax.checkpoint import CheckpointError
from mmx_jax.config import ConfigError
from mmx_jax.config.command_line import fail_with, parse_flags
from mmx_jax.data import DataError, Tokenizer
from mmx_jax.inference.flags import define_checkpoint_flags
from mmx_jax.inference.generator import Generator
from mmx_jax.inference.load import LoadError, load_for_inference, with_tokenizer
from mmx_jax.inference.sampling import SamplingConfig

STREAMED_STEPS = 4
"""Tokens between two looks at a streamed continuation."""
EXIT_INTERRUPTED = 130


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    text, number, real = (partial(define, flag_values=values)
                          for define in (flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float))  # fmt: skip
    define_checkpoint_flags(values)
    text("tokenizer", None, "Tokenizer; by default the one the model was trained with.")
    text("prompt", None, "Text to continue.")
    text("prompts_file", None, "File of prompts: a line each, or .jsonl with a field 'prompt'.")
    text("output", None, "With --prompts_file: write .jsonl here instead of the terminal.")
    number("max_new_tokens", 256, "Tokens of a continuation at most.", lower_bound=1)
    real("temperature", 0.8, "0 always takes the likeliest token.")
    number("top_k", None, "Sample from so many of the likeliest tokens.")
    real("top_p", 0.95, "Sample from the likeliest tokens that reach this probability together.")
    real("min_p", 0.0, "Sample from tokens at least this share as likely as the likeliest.")
    number("seed", 0, "Seed of the samples.")
    number("slots", 8, "Prompts of a file that are worked on together.", lower_bound=1)


class PromptError(ValueError):
    """Prompts that cannot be read."""


@runtime_checkable
class Screen(Protocol):
    """Where a stream goes: a terminal, or a file."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: its lines that are not empty, or the field "prompt" of each line of a .jsonl file.

    Lines end in newlines and nothing else: U+2028, which JSON strings may hold, ends none.

    Raises:
      PromptError: no such file, no UTF-8, no prompt in it, or a line that is no such object; names file and line.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff").split("\n")
    except OSError as error:
        raise PromptError(f"--prompts_file: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--prompts_file: {path}: byte {error.start} is not UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
                if not isinstance(line, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise PromptError(f'--prompts_file: {path}:{number}: must be an object {{"prompt": "text"}}') from None
        prompts.append(line)
    if not prompts:
        raise PromptError(f"--prompts_file: {path}: holds no prompt")
    return prompts


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; bytes of the command line that are no UTF-8 become U+FFFD.

    Raises:
      PromptError: it has no ids.
    """
    ids = tokenizer.encode(prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    if not ids:
        raise PromptError(f"prompt {prompt!r} is empty: a continuation needs some text before it")
    return ids


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than newline and tab become their pictures."""
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else _printable_rest(c) for c in text)


def _printable_rest(character: str) -> str:
    return "\ufffd" if 0x7F <= ord(character) <= 0x9F else character


def stream_to(
    output: Screen, generator: Generator, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig, limit: int
) -> str:
    """Writes a prompt and its continuation as it comes; returns a line on speed."""
    ids = encode(tokenizer, prompt)
    clean = printable if output.isatty() else str
    decoder = tokenizer.stream_decoder(continuation=True)
    output.write(clean(prompt))
    output.flush()
    times = [time.monotonic()]
    for token in generator.stream(ids, sampling, limit):
        times.append(time.monotonic())
        output.write(clean(decoder.push(token)))
        output.flush()
    output.write(clean(decoder.finish()) + "\n")
    return _stream_speed(len(ids), times)


def _stream_speed(prompt_tokens: int, times: Sequence[float]) -> str:
    """Speed after the first block of tokens: what comes before is the prompt, and compiling."""
    count = len(times) - 1
    if count == 0:
        return f"prompt of {prompt_tokens} tokens; the text ended there"
    said = f"{count} tokens after a prompt of {prompt_tokens}; the first one after {times[1] - times[0]:.1f} s"
    # Tokens arrive in blocks; the first block's wait holds a compilation as well.
    settled = 1 + STREAMED_STEPS
    if count <= settled:
        return said
    return f"{said}, then {(count - settled) / max(times[-1] - times[settled], 1e-9):,.1f} tokens/s"


def continue_all(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig, limit: int
) -> tuple[list[str], str]:
    """Continuations of many prompts, and a line on speed."""
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    start = time.monotonic()
    outputs = generator.generate(ids, sampling, limit)
    seconds = time.monotonic() - start
    count = sum(map(len, outputs))
    work = f"{count} tokens for {len(prompts)} prompts in {seconds:.1f} s"
    speed = f"{work}: {count / seconds:,.1f} tokens/s, compiling included"
    return [tokenizer.decode(output, continuation=True) for output in outputs], speed


def check_output(path: str) -> None:
    """Checks that a file can be written, before the work whose result goes into it.

    Raises:
      PromptError: it is a folder, its folder is missing, or it may not be written.
    """
    place = Path(path)
    if place.is_dir():
        raise PromptError(f"--output: {path}: is a folder; name a file in it")
    if not place.parent.is_dir():
        raise PromptError(f"--output: {path}: there is no folder {place.parent}; make it, or name another")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise PromptError(f"--output: {path}: may not be written")


def write_continuations(path: str, prompts: Sequence[str], continuations: Sequence[str]) -> None:
    """Writes {"prompt", "continuation"} lines.

    Raises:
      PromptError: the file cannot be written.
    """
    records = ({"prompt": prompt, "continuation": text} for prompt, text in zip(prompts, continuations))
    try:
        Path(path).write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    except OSError as error:
        raise PromptError(f"--output: {path}: {error.strerror}") from error


def run(options: flags.FlagValues) -> int:
    """Runs the command with parsed flags; returns its exit code, and ends the program when it cannot work."""
    # A terminal that cannot show a character shows a question mark instead of ending the program.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        print(_continue(options), file=sys.stderr)
        return 0
    except (PromptError, ConfigError, CheckpointError, DataError, LoadError) as error:
        return fail_with(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _continue(options: flags.FlagValues) -> str:
    """Checks what is cheap to check, loads the model, writes continuations; returns the line that ends them."""
    if options.checkpoint is None:
        raise PromptError("--checkpoint is missing: name a run's workdir, as in --checkpoint runs/quickstart")
    if (options.prompt is None) == (options.prompts_file is None):
        raise PromptError("give either --prompt or --prompts_file")
    if options.output is not None and options.prompts_file is None:
        raise PromptError("--output goes with --prompts_file")
    if options.output is not None:
        check_output(options.output)
    sampling = SamplingConfig(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
                              min_p=options.min_p, seed=options.seed)  # fmt: skip
    prompts = None if options.prompts_file is None else read_prompts(options.prompts_file)
    loaded, tokenizer = with_tokenizer(load_for_inference(options.checkpoint, options.step), options.tokenizer)
    if prompts is None:
        generator = Generator(loaded.model, loaded.params, slots=1, decode_steps=STREAMED_STEPS)
        speed = stream_to(sys.stdout, generator, tokenizer, options.prompt, sampling, options.max_new_tokens)
    else:
        generator = Generator(loaded.model, loaded.params, slots=options.slots)
        continuations, speed = continue_all(generator, tokenizer, prompts, sampling, options.max_new_tokens)
        if options.output is None:
            for prompt, continuation in zip(prompts, continuations):
                print(printable(f"{prompt}{continuation}"), end="\n\n")
        else:
            write_continuations(options.output, prompts, continuations)
    return f"[{loaded.run.name}, step {loaded.step}] {speed}"


def main(argv: Sequence[str]) -> int:
    """Entry point after flags are parsed."""
    if len(argv) > 1:
        fail_with(PromptError(f"unexpected argument {argv[1]!r}; the text goes into --prompt"))
    return run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
