"""The engine's lanes on an NVIDIA GPU: they enqueue work on streams, and nothing in them waits for the device."""
