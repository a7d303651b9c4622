"""Errors a user may see. Every message is one line: what was wrong, where, and the remedy."""


class TideError(Exception):
    """Base of all errors with a message meant for the user. The command line prints it alone and exits with
    1."""

    exit_code = 1


class UsageError(TideError):
    """A bad option or combination of options; the command line exits with 2."""

    exit_code = 2


class CorpusError(TideError):
    """A corpus that cannot be read: missing file, wrong field, nothing usable in it."""


class ModelError(TideError):
    """A model folder that cannot be used: missing, of an unknown family, weights missing or left over."""


class ShardError(TideError):
    """Base of everything that can be wrong with a logit dataset."""


class RowError(ShardError):
    """A row breaks the schema or an invariant (names the column, the row, expected and got)."""


class CorruptShard(ShardError):
    """Bytes differ from the manifest: truncated, flipped or swapped file."""


class ManifestError(ShardError):
    """A manifest is missing, unreadable, or contradicts itself."""


class VersionError(ShardError):
    """A format version or codec this program does not know."""


class ConfigMismatch(ShardError):
    """A dataset made with another configuration, tokenizer or model than the one it is used with."""


class PlanMismatch(ShardError):
    """A stored noise plan differs from the one its seed, sample id and view give."""
