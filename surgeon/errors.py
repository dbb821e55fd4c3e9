"""The errors Surgeon raises on purpose.

Every message says what failed, where, the value got, what is allowed and what to try. The command line turns
`InputError` into exit status 2 and any other error into exit status 1.
"""


class SurgeonError(Exception):
    """Base of all errors raised on purpose by this project."""


class InputError(SurgeonError):
    """Something the user gave cannot work; found before any long work where that is possible."""


class ParameterError(InputError):
    """A parameter is unknown, has the wrong type, is out of range, or has no effect in this combination."""


class ModelError(InputError):
    """A model cannot be found, read or understood (missing files, unknown blocks, wrong checksum)."""


class TextError(InputError):
    """A text cannot be read, is too short, or overlaps with the text it must be kept apart from."""


class TaskError(InputError):
    """A downstream task cannot be scored: it is unknown, its data or lm-eval are missing, or it does not work."""


class StoreError(InputError):
    """A store cannot be used: another version, no space, not a store."""


class BucketError(StoreError):
    """A bucket does not answer, or refuses what is asked of it."""


class ServerError(InputError):
    """A server that is to show and record the run does not answer, or cannot be used."""


class CorruptObjectError(SurgeonError):
    """A stored object does not hold what was committed (missing chunk, flipped bit, wrong shape).

    Attributes:
        key: of the object. The store moves it aside before it raises, so that it is missing and can be computed again.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key

    def __reduce__(self) -> tuple[type["CorruptObjectError"], tuple[str, str]]:
        """It comes back whole from a worker process."""
        return type(self), (str(self), self.key)


class EvictedError(SurgeonError):
    """The payload of a stored object was dropped by the retention policy; only its reference remains."""


class NondeterminismError(SurgeonError):
    """The same key was computed twice with different results."""


class ClusterError(InputError):
    """Workers cannot be used: a cluster does not answer, or they have other versions, devices or files."""


class WorkerLostError(SurgeonError):
    """Worker processes died again and again while they computed the same thing; mostly there was not enough memory."""


class BenchmarkError(SurgeonError):
    """A model could not be measured: its process died, or had not enough memory."""


class NonFiniteError(SurgeonError):
    """A NaN or an infinity appeared; the message names block, linear and sequence."""


class MemoryShortageError(SurgeonError):
    """A computation ran out of memory; the message names the settings to lower. What was finished before is kept."""


class BatchMemoryError(MemoryShortageError):
    """A GPU had not enough memory for work that takes less of it with fewer sequences at a time."""


class NumericalError(SurgeonError):
    """A factorisation failed although damping was escalated as far as allowed."""


class ExportError(SurgeonError):
    """An exported checkpoint does not load back to the same model."""
