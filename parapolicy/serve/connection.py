"""A connection that is closed when its client floods it, so that no client can block the others."""

import logging

from websockets.asyncio.server import ServerConnection
from websockets.protocol import Event

log = logging.getLogger("parapolicy.serve")

_PIECE_BYTES = 4096
_MOST_FRAMES = 256  # per delivery of at most 256 KiB; a client that waits for answers sends one, and a ping
_MOST_UNREAD_BYTES = 1 << 18


class BoundedConnection(ServerConnection):
    """A delivery may contain tens of thousands of frames of six bytes, which take half a second to parse; answers to
    pings that are never read would fill the memory. Both close the connection."""

    _frames = 0

    def process_event(self, event: Event) -> None:
        """Count a frame."""
        self._frames += 1
        super().process_event(event)

    def data_received(self, data: bytes) -> None:
        """Parse a delivery in pieces, and stop at too many frames."""
        self._frames = 0
        for begin in range(0, len(data), _PIECE_BYTES):
            super().data_received(data[begin : begin + _PIECE_BYTES])
            unread = self.transport.get_write_buffer_size()
            if self._frames > _MOST_FRAMES or unread > _MOST_UNREAD_BYTES:
                log.info("%s: flooded: %d frames at once, %d bytes not read", self.remote_address, self._frames, unread)
                self.transport.abort()
                return
