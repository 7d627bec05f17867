"""A policy server that speaks the websocket protocol of openpi's public client."""
