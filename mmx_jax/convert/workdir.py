"""The workdir that weights are imported into: its own, and what goes beside the checkpoints."""

import json
import os
import re
from pathlib import Path

from absl import logging

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.store import step_folder_name
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.hf_config import end_of_text_ids
from mmx_jax.convert.source import CONFIG_FILE, GENERATION_FILE, TOKENIZER_FILES, read_companions, read_end_ids
from mmx_jax.convert.stored import CHECKPOINTS

STEP = 0
TEMPORARY = "00000000.importing"


def refuse_used(workdir: Path) -> None:
    """Checks that a workdir holds nothing but, perhaps, what an import of weights has left there.

    Raises: ConvertError naming what is there: a step, or the configuration of another run.
    """
    advice = "imported weights need a workdir of their own"
    steps = workdir / CHECKPOINTS
    if (final := steps / step_folder_name(STEP)).exists():
        raise ConvertError(f"{final} is there already; choose another folder, or remove it")
    found = sorted(entry.name for entry in steps.iterdir() if re.match(r"\d{8}", entry.name)) if steps.is_dir() else []
    if others := [name for name in found if name != TEMPORARY]:
        raise ConvertError(f"{workdir}: holds checkpoints of another run (the first is {others[0]}); {advice}")
    if os.path.lexists(workdir / CONFIG_FILE):
        raise ConvertError(f"{workdir}: holds a {CONFIG_FILE}, of another run or of published weights; {advice}")


def companions(source: Path) -> dict[str, bytes]:
    """Name -> content of the files that go beside the checkpoints: tokenizer, and where generation ends.

    The configuration has room for one end-of-text id; where the source has several, all are in generation_config.json.
    Raises: WeightsFileError.
    """
    files = read_companions(source)
    if len(ids := read_end_ids(source)) > 1:
        known = json.loads(files[GENERATION_FILE]) if GENERATION_FILE in files else {}
        if not end_of_text_ids(known, source / GENERATION_FILE):
            files[GENERATION_FILE] = (json.dumps(known | {"eos_token_id": list(ids)}, indent=1) + "\n").encode()
        logging.warning(
            "%s: generation ends at any of %s, but a model here stops by itself only at the first: give the others as "
            "stop ids. All are kept in %s and come back with an export",
            source,
            list(ids),
            GENERATION_FILE,
        )
    return files


def write_companions(files: dict[str, bytes], workdir: Path, *, check_only: bool = False) -> None:
    """Puts these files into a workdir that has none of them, or exactly them.

    Raises: ConvertError when a tokenizer or generation config of something else is there; OSError.
    """
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        path = workdir / name
        if os.path.lexists(path):
            if not path.is_file() or files.get(name) != path.read_bytes():
                reason = "is there already and is not the source's; imported weights need a workdir of their own"
                raise ConvertError(f"{path} {reason}")
        elif name in files and not check_only:
            layout.write_bytes(path, files[name])
