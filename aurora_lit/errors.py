"""Every exception that aurora_lit raises on purpose.

Leaves out: mistakes of our own, which stay `assert` or plain Python errors.

    AuroraError
    ├── ConfigError        a setting is wrong: full key, value received, remedy
    ├── SourceError        the target model cannot be had: not found, offline, wrong hash
    ├── CheckpointError    a draft checkpoint is refused, and why
    ├── TraceError         bytes that are no trace
    ├── RingError          a trace ring cannot be made or opened
    ├── RankError          a process that holds a part of the target was lost
    └── RequestError       a client's request is refused; becomes an OpenAI error body
"""


class AuroraError(Exception):
    """Root of all; the command line prints it as one line and ends with exit code 2."""


class ConfigError(AuroraError):
    """A setting that cannot be used; the message names the full key, the value and the remedy."""


class SourceError(AuroraError):
    """The target model cannot be had from its source; the message says what to do."""


class CheckpointError(AuroraError):
    """A draft checkpoint that is refused; the message says why."""


class TraceError(AuroraError):
    """Bytes that are no trace of this version; the message says what is wrong with them."""


class RingError(AuroraError):
    """A trace ring that cannot be made or opened: no room, another layout, or somebody else reads it."""


class RankError(AuroraError):
    """A process that holds a part of the target was lost, or no longer does what the others do."""


class RequestError(AuroraError):
    """A client's request that is refused.

    message: what is wrong, with the value received and what would be right
    param:   name of the offending field, None when it is no single field
    code:    machine-readable word of OpenAI's error body, None when there is none
    status:  HTTP status
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        """Keep the parts beside the message, so that a route can build the error body."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling: the error crosses from the engine worker to the HTTP process."""
        return (_rebuild_request_error, (self.message, self.param, self.code, self.status))


def _rebuild_request_error(message: str, param: str | None, code: str | None, status: int) -> RequestError:
    return RequestError(message, param=param, code=code, status=status)
