"""The one family of errors that a user can cause and cure, and the exit codes of all."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the signal's number."""


class UserError(Exception):
    """Something the user gave is wrong: a flag, a file, a layout, a checkpoint.

    The message names the file or field, its value and the rule, and says what to do. The command line prints it
    without a traceback and exits with :attr:`exit_code`.
    """

    exit_code = 1


class ConfigError(UserError):
    """A flag or a recipe's key is unknown, malformed, or in conflict with another one."""

    exit_code = 2


class DataError(UserError):
    """An annotation, a video file, a prepared data set or one of its shards is missing or malformed."""


class DivergenceError(UserError):
    """Too many updates had to be skipped; raised on all ranks alike."""


class CheckpointError(UserError):
    """A checkpoint or an export is missing, damaged, or made for another model."""


class StorageError(CheckpointError):
    """A checkpoint could not be written because the disk is full or refuses; the one before is as it was."""


class WriteError(UserError):
    """A file cannot be written: the disk is full, a permission is missing."""


class PeerError(UserError):
    """This process stops only because another process of the job failed; the message of that one says why."""


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1
