"""What is answered to a request that cannot be served."""


class Refused(Exception):
    """What was asked for cannot be done; the message says why, `status` which HTTP status says so."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status
