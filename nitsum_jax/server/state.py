"""The state of the server between start and end."""

import enum

from nitsum_jax.errors import UnavailableError
from nitsum_jax.runtime.backend import Backend


class ServerPhase(enum.Enum):
    """Where the server stands between start and end."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class ServerState:
    """The phase of the server and, once it serves, the backend. Only the event loop touches it."""

    def __init__(self) -> None:
        self.phase = ServerPhase.STARTING
        self.backend: Backend | None = None
        self.ready_at = 0
        """When the model was ready, in seconds since 1970."""

    def present(self) -> Backend:
        """The backend, also while draining.

        Raises:
          UnavailableError: the model is still being loaded.
        """
        if self.backend is None:
            raise UnavailableError("the server is starting: try again when its health check says SERVING")
        return self.backend

    def admitting(self) -> Backend:
        """The backend, if new work is welcome.

        Raises:
          UnavailableError: the server is starting or draining.
        """
        backend = self.present()
        if self.phase is ServerPhase.DRAINING:
            raise UnavailableError("the server is draining: send the request to another one or try again later")
        return backend
