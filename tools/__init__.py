"""Commands that make demonstrations or documents."""
