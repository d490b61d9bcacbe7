"""Where a snapshot's bytes lie: files, compressions, and the containers around a stream."""
