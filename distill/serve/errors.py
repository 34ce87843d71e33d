"""What is answered to a request that cannot be served."""


class Refused(Exception):
    """What was asked for cannot be done now, or at all.

    Args:
        status: of the answer.
        code: what went wrong, for programs; these are kept.
        message: the same for people. Says nothing of this machine.
        retry_after: seconds after which the same may work.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Gone(Exception):
    """Whoever asked is not there any more, or does not wait: the answer is nobody's."""


def busy(message: str) -> Refused:
    """There is too much to do."""
    return Refused(503, "busy", message, retry_after=1)
