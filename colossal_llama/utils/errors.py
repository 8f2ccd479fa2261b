"""One exception type for users' mistakes, turned into an exit code in one place."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable

USER_ERROR_EXIT_CODE = 2

# Conditions of the user's machine, not faults of this program: reported without a traceback.
_ENVIRONMENT_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EBUSY,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
}
_FREE_SPACE = "free some space or choose another directory, then run the same command again"
_RAISE_LIMIT = "raise the limit of open files (ulimit -n)"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EMFILE: _RAISE_LIMIT,
    errno.ENFILE: _RAISE_LIMIT,
}


class UserError(Exception):
    """Something that the user can fix: each problem names file and line, or flag, the value, and the remedy.

    Args:
        problems: one message or several; all of them are printed, one per line.
        this_rank_only: the problem exists on this process alone, so it prints even when it is not rank 0.
        exit_code: of the process; 1 for what is no mistake of the user, such as a loss that is not finite.
    """

    def __init__(
        self,
        problems: str | Iterable[str],
        this_rank_only: bool = False,
        exit_code: int = USER_ERROR_EXIT_CODE,
    ) -> None:
        self.exit_code = exit_code
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.this_rank_only = this_rank_only
        super().__init__("\n".join(self.problems))


def is_main_process() -> bool:
    """Whether this process is rank 0, or was not started by a launcher at all."""
    return os.environ.get("RANK", "0") == "0"


def print_problems(problems: Iterable[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.stderr.flush()


def prepare_output_streams() -> None:
    """Output that was closed goes nowhere; characters that the terminal's encoding lacks are escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as we run)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(main: Callable[[], int | None], exit_at_once: bool = False) -> None:
    """Runs a script's `main` and exits: 2 with the problems on stderr for a `UserError`, 130 for Ctrl-C.

    Args:
        exit_at_once: leave without the interpreter's clean-up. Destroying a gloo process group whose peers
            have left can hang for ever (seen with torch 2.5 on three ranks), holding the interpreter's lock.
    """
    prepare_output_streams()
    try:
        code = _run(main)
    except Exception:
        if not exit_at_once:
            raise
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_at_once:
        os._exit(code)
    sys.exit(code)


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        if is_main_process() or error.this_rank_only:
            print_problems(error.problems)
        return error.exit_code
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRNOS:
            raise
        # Of two files, the second is the one that was written.
        problem = f"{error.filename2 or error.filename or 'output'}: {error.strerror}"
        remedy = _REMEDIES.get(error.errno)
        print_problems([f"{problem}; {remedy}" if remedy else problem])
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
