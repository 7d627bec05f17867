"""A connection that ends when its client floods it, so that no client can hold up the others."""

import logging

from websockets.asyncio.server import ServerConnection
from websockets.protocol import Event

log = logging.getLogger("parapolicy.serve")

_PIECE_BYTES = 4096
_MOST_FRAMES = 256  # in one delivery, of at most 256 KiB; a client that waits for its answers sends one, and a ping
_MOST_UNREAD_BYTES = 1 << 18


class BoundedConnection(ServerConnection):
    """Frames of six bytes come by tens of thousands in one delivery, and parsing that many takes half a second; answers
    to pings that are never read would fill the memory. Both end the connection."""

    _frames = 0

    def process_event(self, event: Event) -> None:
        """Count a frame."""
        self._frames += 1
        super().process_event(event)

    def data_received(self, data: bytes) -> None:
        """Parse a delivery by pieces, until there are too many frames in it."""
        self._frames = 0
        for begin in range(0, len(data), _PIECE_BYTES):
            super().data_received(data[begin : begin + _PIECE_BYTES])
            unread = self.transport.get_write_buffer_size()
            if self._frames > _MOST_FRAMES or unread > _MOST_UNREAD_BYTES:
                log.info("%s: flooded: %d frames at once, %d bytes not read", self.remote_address, self._frames, unread)
                self.transport.abort()
                return
