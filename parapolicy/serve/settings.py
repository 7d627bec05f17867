"""Settings of the policy server."""

import os
from dataclasses import dataclass, field
from pathlib import Path

KEY_VARIABLE = "PARAPOLICY_API_KEY"
_POSITIVE = ("control_hz", "deadline_ms", "episode_pause_s", "ping_interval", "ping_timeout")
_COUNTS = ("max_batch", "max_connections", "max_message_bytes")


@dataclass
class ServeConfig:
    """Settings of ``parapolicy serve``, each given as ``key=value``.

    Attributes:
        checkpoint: the policy folder.
        host, port: address to listen on; host 0.0.0.0: every network; port 0: any free one.
        sampler, device, engine: see :func:`parapolicy.load_policy`.
        control_hz: control rate of the demonstrations, if the checkpoint does not say it.
        warm_start: start each chunk of an episode from the previous one's warm state.
        deadline_ms: time for a batch of chunks; None: no deadline.
        episode_pause_s: a message without ``reset`` that arrives later than this after the last answer begins a new
            episode; None: the time of four chunks, at least 1 s; inf: never.
        api_key: required of clients as ``Authorization: Api-Key …``. Other users of the machine see it in the process
            list: prefer ``api_key_file`` or the environment variable ``PARAPOLICY_API_KEY``. Without any of the three,
            no key is required.
        api_key_file: a file that contains only the key.
        origins: accepted values of the ``Origin`` header, which browsers send, such as https://robot.example.
        max_batch: most clients computed together.
        max_connections: further connections are refused with 503.
        max_message_bytes: longer messages close their connection; None: as long as the policy's observations need.
        ping_interval: seconds between pings of an open connection; None: no pings.
        ping_timeout: seconds after which an unanswered ping closes the connection; None: never.

    Raises:
        ValueError: a count or a time is not positive, or there are two API keys.
    """

    checkpoint: str = "checkpoints/pusht_lowdim"
    host: str = "127.0.0.1"
    port: int = 8000
    sampler: str | None = None
    device: str = "auto"
    engine: str = "auto"
    control_hz: float | None = None
    warm_start: bool = False
    deadline_ms: float | None = None
    episode_pause_s: float | None = None
    api_key: str | None = None
    api_key_file: str | None = None
    origins: list[str] = field(default_factory=list)
    max_batch: int = 16
    max_connections: int = 64
    max_message_bytes: int | None = None
    ping_interval: float | None = 20.0
    ping_timeout: float | None = 120.0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a positive number, or null")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("api_key and api_key_file are both given, expected one of them")

    def read_api_key(self) -> str | None:
        """The key from its setting, its file or the environment variable, in this order; None: no key is required.

        Raises:
            ValueError: the key is empty or not valid in a header.
            OSError: the file cannot be read.
        """
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if self.api_key is not None:
            source, key = "api_key", self.api_key
        elif self.api_key_file is not None:
            source = f"the file {self.api_key_file!r}"
            key = Path(self.api_key_file).read_text(encoding="utf-8", errors="replace").strip()
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError(
                f"{source} holds {len(key)} characters that are not a valid key, expected one line of ASCII text"
            )
        return key
