"""The engine's Cython floor: loops over areas that follow plans, one plan a header."""
