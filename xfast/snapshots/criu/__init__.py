"""CRIU's images: the wire format, the registers and CPUs in it, and the format made of them."""
