"""QEMU migration streams: the stream, its cpu sections, and the format made of both."""
