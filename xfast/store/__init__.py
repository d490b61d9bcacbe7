"""One safe writer: files that change as a whole or not at all."""
