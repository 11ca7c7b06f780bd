"""Released weights in, safetensors out, and tools to trust both (docs/conversion.md).

python -m mmx_jax.convert check  --config configs/minimax_text_01.py and/or --source DIR
python -m mmx_jax.convert import --source DIR --checkpoint DIR [--dtype bf16|fp32] [--quantize int8]
python -m mmx_jax.convert export --checkpoint DIR --output DIR --format hub|transformers [--max-shard 5GB]
                         [--dtype bf16|fp32] [--tokenizer DIR]
python -m mmx_jax.convert diff   A B
python -m mmx_jax.convert logits --checkpoint DIR --tokens F.npy --output F.npy [--decode] [--compute float32]

--checkpoint is a workdir; `import` makes its step 0, the others also take a folder of checkpoints or a single step.
Exit code: 0 all is well; 1 `diff` or `check` looked and found a difference; 2 it could not be done, and stderr says
why; 3 a defect of this program, with its traceback; 130 interrupted.
"""

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from mmx_jax.checkpoint import CheckpointError
from mmx_jax.config import ConfigError
from mmx_jax.config.overrides import load_config
from mmx_jax.convert.check import check_conversion
from mmx_jax.convert.compare import compare_weights
from mmx_jax.convert.errors import ConvertError, WeightsMismatchError
from mmx_jax.convert.exporting import MAX_SHARD, export_weights, notes
from mmx_jax.convert.hf_config import FORMATS
from mmx_jax.convert.importing import DTYPES, import_weights
from mmx_jax.convert.logits import logits_file
from mmx_jax.convert.stored import StoredWeights

FLAGS = flags.FLAGS
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SMALLEST_SHARD = 10**6
SHOWN = 20
GOOD, DIFFERENT, IMPOSSIBLE, DEFECT, INTERRUPTED = 0, 1, 2, 3, 130


def define_flags() -> None:
    """The command line's flags but `--config`, which the configuration's own module has; only for this program."""
    flags.DEFINE_string("source", None, "folder of published weights")
    flags.DEFINE_string("checkpoint", None, "workdir of the checkpoint")
    flags.DEFINE_string("output", None, "export: folder to make; logits: .npy file to write")
    flags.DEFINE_enum("format", None, FORMATS, "whose code will load it")
    flags.DEFINE_enum("dtype", None, DTYPES, "dtype of the weights; as they are when not given")
    flags.DEFINE_enum("quantize", None, ["int8"], "weight-only quantisation")
    flags.DEFINE_string("max-shard", None, "largest file, such as 5GB")
    flags.DEFINE_string("tokenizer", None, "folder with tokenizer files; the workdir's when not given")
    flags.DEFINE_string("tokens", None, ".npy file, int32 [B, T]")
    flags.DEFINE_bool("decode", False, "token by token through the cache")
    flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "precision of the matmuls")


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500 MiB", at least 1 MB. Raises: ConvertError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([A-Za-z]+)", text.strip())
    if not match or match[2].upper() not in UNITS:
        raise ConvertError(f"size {text[:40]!r}: write a number with its unit, such as 5GB or 500MiB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < SMALLEST_SHARD:
        raise ConvertError(f"size {text[:40]!r}: files of {size} bytes are too small; give at least 1MB")
    return size


def _check(console: Console) -> bool:
    if FLAGS.config is None and FLAGS.source is None:
        raise ConvertError("needs --config, --source or both")
    config = load_config(FLAGS.config).model if FLAGS.config else None
    try:
        result = check_conversion(config, FLAGS.source)
    except WeightsMismatchError as error:
        console.print(str(error), markup=False)
        return False
    for line in result.lines():
        console.print(line, markup=False)
    return result.complete


def _import(console: Console) -> bool:
    step = import_weights(FLAGS.source, FLAGS.checkpoint, dtype=FLAGS.dtype, quantize=FLAGS.quantize)
    console.print(f"imported to {step}", markup=False)
    return True


def _export(console: Console) -> bool:
    largest = FLAGS["max-shard"].value
    size = MAX_SHARD if largest is None else parse_size(largest)
    given: dict[str, Any] = {"dtype": FLAGS.dtype, "max_shard": size, "tokenizer": FLAGS.tokenizer}
    folder = export_weights(FLAGS.checkpoint, FLAGS.output, FLAGS.format, **given)
    console.print(f"exported to {folder}", markup=False)
    for note in notes(StoredWeights(FLAGS.checkpoint).config, FLAGS.format):
        console.print(f"note: {note}", markup=False)
    return True


def _diff(console: Console, first: str, second: str) -> bool:
    differing = equal = 0
    for result in compare_weights(first, second):
        if result.problem == "equal":
            equal += 1
            continue
        differing += 1
        if differing <= SHOWN:
            sizes = f", largest difference {result.largest:.3g}, relative {result.relative:.3g}"
            console.print(f"{result.name}: {result.problem}{sizes if result.largest else ''}", markup=False)
    more = f" ({differing - SHOWN} not shown)" if differing > SHOWN else ""
    console.print(f"{equal} tensors bit-equal, {differing} differ{more}")
    return not differing


def _logits(console: Console) -> bool:
    logits_file(FLAGS.checkpoint, FLAGS.tokens, FLAGS.output, decode=FLAGS.decode, compute=FLAGS.compute)
    console.print(f"logits in {FLAGS.output}", markup=False)
    return True


@dataclass(frozen=True)
class Command:
    """One command: what it runs, the flags and the number of plain arguments that it takes."""

    run: Callable[..., bool]
    needed: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    arguments: int = 0

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags that it uses."""
        return (*self.needed, *self.taken)


COMMANDS = {
    "check": Command(_check, taken=("config", "source")),
    "import": Command(_import, ("source", "checkpoint"), ("dtype", "quantize")),
    "export": Command(_export, ("checkpoint", "output", "format"), ("dtype", "max-shard", "tokenizer")),
    "diff": Command(_diff, arguments=2),
    "logits": Command(_logits, ("checkpoint", "tokens", "output"), ("decode", "compute")),
}


def check_command_line(name: str, rest: Sequence[str]) -> Command:
    """The command of a name, its flags and arguments being those that it takes, each given once and not empty.

    Raises: ConvertError naming the flag and the commands that take it.
    """
    command = COMMANDS[name]
    for flag in sorted({flag for known in COMMANDS.values() for flag in known.flags}):
        if not FLAGS[flag].present:
            continue
        if flag not in command.flags:
            takers = " and ".join(other for other, known in COMMANDS.items() if flag in known.flags)
            raise ConvertError(f"--{flag} means nothing here; {takers} {'take' if ' ' in takers else 'takes'} it")
        if FLAGS[flag].present > 1:
            raise ConvertError(f"--{flag} is given {FLAGS[flag].present} times")
        if FLAGS[flag].value == "":
            raise ConvertError(f"--{flag} is empty")
    if missing := [f"--{flag}" for flag in command.needed if FLAGS[flag].value is None]:
        raise ConvertError(f"needs {' and '.join(missing)}")
    if len(rest) != command.arguments:
        wanted = f"takes {command.arguments or 'no'} plain arguments, got {len(rest)}"
        raise ConvertError(f"{wanted}{': ' if rest else ''}{' '.join(map(repr, rest))}")
    return command


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names in a file can be anything
    console = Console(soft_wrap=True, highlight=False)
    name, rest = (argv[1] if len(argv) > 1 else ""), argv[2:]
    if name not in COMMANDS:
        print(f"convert: {f'no command {name!r}' if name else 'needs a command'}\n{__doc__}", file=sys.stderr)
        return IMPOSSIBLE
    try:
        return GOOD if check_command_line(name, rest).run(console, *rest) else DIFFERENT
    except (ConvertError, CheckpointError, ConfigError, OSError) as error:
        print(f"convert {name}: {error}", file=sys.stderr)
        return IMPOSSIBLE
    except KeyboardInterrupt:
        print(f"convert {name}: interrupted; a stopped import goes on with the same command", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print(
            f"convert {name}: this is a defect of the program; please report it with the lines above", file=sys.stderr
        )
        return DEFECT


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags; one that nobody knows, or a value that cannot be, ends with one line and exit code 2."""
    if {"-h", "-help", "--help"} & set(argv):
        print(__doc__)
        sys.exit(GOOD)
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        print(f"convert: {error}\nFlags of each command: python -m mmx_jax.convert", file=sys.stderr)
        sys.exit(IMPOSSIBLE)
    if FLAGS["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
    return rest


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
