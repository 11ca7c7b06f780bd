"""Released weights in, safetensors out, and tools to trust both (docs/conversion.md).

python -m mmx_jax.convert check  --config configs/minimax_text_01.py [--source DIR]
python -m mmx_jax.convert import --source DIR --checkpoint DIR [--dtype bf16|fp32] [--quantize int8]
python -m mmx_jax.convert export --checkpoint DIR --output DIR --format hub|transformers [--max-shard 5GB]
                         [--dtype bf16|fp32] [--tokenizer DIR]
python -m mmx_jax.convert diff   A B
python -m mmx_jax.convert logits --checkpoint DIR --tokens F.npy --output F.npy [--decode] [--compute float32]

--checkpoint is a workdir; `import` makes its step 0, the others also take a folder of checkpoints or a single step.
Exit code: 0 when all is well, 1 when `diff` or `check` find a difference, 2 for anything that cannot work.
"""

import re
import sys
from typing import Any

from absl import app, flags
from rich.console import Console

from mmx_jax.checkpoint import CheckpointError
from mmx_jax.config import ConfigError
from mmx_jax.config.overrides import load_config
from mmx_jax.convert.check import check_conversion
from mmx_jax.convert.compare import compare_weights
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.exporting import MAX_SHARD, export_weights, notes
from mmx_jax.convert.hf_config import FORMATS
from mmx_jax.convert.importing import DTYPES, import_weights
from mmx_jax.convert.logits import logits_file
from mmx_jax.convert.stored import StoredWeights

FLAGS = flags.FLAGS
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHOWN = 20


def define_flags() -> None:
    """The command line's flags; defined when this is the program, for `--config` is others' too."""
    if "config" not in FLAGS:
        flags.DEFINE_string("config", None, "check: configuration file")
    flags.DEFINE_string("source", None, "import, check: folder of published weights")
    flags.DEFINE_string("checkpoint", None, "import, export, logits: workdir of the checkpoint")
    flags.DEFINE_string("output", None, "export: folder to make; logits: .npy file to write")
    flags.DEFINE_enum("format", None, FORMATS, "export: whose code will load it")
    flags.DEFINE_enum("dtype", None, DTYPES, "import, export: dtype of the weights; as they are when not given")
    flags.DEFINE_enum("quantize", None, ["int8"], "import: weight-only quantisation")
    flags.DEFINE_string("max-shard", None, "export: largest file, such as 5GB")
    flags.DEFINE_string("tokenizer", None, "export: folder with tokenizer files; the workdir's when not given")
    flags.DEFINE_string("tokens", None, "logits: .npy file, int32 [B, T]")
    flags.DEFINE_bool("decode", False, "logits: token by token through the cache")
    flags.DEFINE_enum("compute", "float32", ["float32", "bfloat16"], "logits: precision of the matmuls")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MiB" or "1000". Raises: ConvertError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ConvertError(f"size {text!r}: write a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _need(*names: str) -> list[str]:
    values: list[Any] = [FLAGS[name].value for name in names]
    if missing := [f"--{name}" for name, value in zip(names, values) if value is None]:
        raise ConvertError(f"needs {' and '.join(missing)}")
    return values


def _check(console: Console) -> bool:
    config = load_config(FLAGS.config).model if FLAGS.config else None
    result = check_conversion(config, FLAGS.source)
    for line in result.lines():
        console.print(line, markup=False)
    return result.complete


def _import(console: Console) -> bool:
    source, checkpoint = _need("source", "checkpoint")
    step = import_weights(source, checkpoint, dtype=FLAGS.dtype, quantize=FLAGS.quantize)
    console.print(f"imported to {step}", markup=False)
    return True


def _export(console: Console) -> bool:
    checkpoint, output, form = _need("checkpoint", "output", "format")
    largest = FLAGS["max-shard"].value
    size = parse_size(largest) if largest else MAX_SHARD
    folder = export_weights(checkpoint, output, form, dtype=FLAGS.dtype, max_shard=size, tokenizer=FLAGS.tokenizer)
    console.print(f"exported to {folder}", markup=False)
    for note in notes(StoredWeights(checkpoint).config, form):
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
    checkpoint, tokens, output = _need("checkpoint", "tokens", "output")
    logits_file(checkpoint, tokens, output, decode=FLAGS.decode, compute=FLAGS.compute)
    console.print(f"logits in {output}", markup=False)
    return True


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    console = Console(soft_wrap=True, highlight=False)
    command, rest = (argv[1] if len(argv) > 1 else ""), argv[2:]
    commands = {"check": _check, "import": _import, "export": _export, "logits": _logits}
    try:
        if command == "diff" and len(rest) == 2:
            return 0 if _diff(console, *rest) else 1
        if command in commands and not rest:
            return 0 if commands[command](console) else 1
    except (ConvertError, CheckpointError, ConfigError) as error:
        print(f"convert {command}: {error}", file=sys.stderr)
        return 2
    print(f"usage:\n{__doc__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    define_flags()
    app.run(main)
