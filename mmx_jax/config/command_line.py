"""What every command does with its flags: one line and exit code 2 for what cannot work."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

EXIT_CONFIG = 2
"""Exit code for a command line, file or configuration that cannot work."""


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Reads the flags, for `app.run`; an unknown one, or a value that cannot be, ends with one line and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        return fail_with(error)


def fail_with(error: Exception, code: int = EXIT_CONFIG) -> Any:
    """Ends the program with one message and no traceback."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    raise SystemExit(code)
