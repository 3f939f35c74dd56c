"""Every exception that aurora_lit raises on purpose. Bugs of our own stay `assert` or built-in exceptions.

AuroraError
├── ConfigError        a setting or command-line option cannot be used
├── SourceError        the target model cannot be loaded from its source
├── CacheError         a file of the cache cannot be used, and is made again
├── CheckpointError    a draft checkpoint is refused
├── TraceError         bytes are not a valid trace
├── RingError          a trace ring cannot be created or opened
├── RankError          a process that holds a part of the target was lost
└── RequestError       a client's request is refused; becomes an OpenAI error body
"""


class AuroraError(Exception):
    """Base class; the command line prints it as one line and exits with code 2."""


class ConfigError(AuroraError):
    """A setting or option that cannot be used; the message names the full key, the value and a remedy."""


class SourceError(AuroraError):
    """The target model was not found, could not be downloaded, or has the wrong hash; the message names a remedy."""


class CacheError(AuroraError):
    """A file of the cache that is damaged, or was made from something else; the message gives the reason."""


class CheckpointError(AuroraError):
    """A draft checkpoint or version that is refused; the message gives the reason."""


class TraceError(AuroraError):
    """Bytes or a record that are not a valid trace of this version; the message gives the reason."""


class RingError(AuroraError):
    """A trace ring that cannot be created or opened: no space, another layout, or another reader."""


class RankError(AuroraError):
    """A process that holds a part of the target was lost, or is out of step with the others."""


class RequestError(AuroraError):
    """A client's request that is refused.

    message: what is wrong, with the value received and what is accepted
    param:   name of the offending field; None if no single field is at fault
    code:    `code` of OpenAI's error body; None if it has none
    status:  HTTP status
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        """Keep the parts beside the message, so that a route can build the error body."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
