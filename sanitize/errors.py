"""What can go wrong, by what the user has to do about it. Every message says what, where and what to do."""


class SanitizeError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(SanitizeError):
    """A setting is wrong or two settings contradict each other: change the configuration."""


class RequestError(ConfigError):
    """What was asked for is not there, or cannot be done as things are; no setting is wrong: ask for something else."""


class DataError(SanitizeError):
    """The data cannot be read, or too much of it is bad: look at the shard and key the message names."""


class ShardError(DataError):
    """A stage on several shards cannot go on because of one shard.

    Attributes:
        shard: its name in the data set.
    """

    def __init__(self, message: str, shard: str = "") -> None:
        super().__init__(message)
        self.shard = shard


class StorageError(SanitizeError):
    """A disk is full, a file may not be written, a store does not answer: mend that, run again; what is done stays."""


class LostLeaseError(StorageError):
    """Another process has taken the run folder, because this one was paused for too long: wait for it, run again."""


class NumericsError(SanitizeError):
    """A loss, statistic or score is not finite: the message names the stage and where it happened."""


class ArtifactError(SanitizeError):
    """A folder was made by another recipe, is damaged, or is not the artifact that was expected."""
