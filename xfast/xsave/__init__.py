"""XSAVE state as values: components, layouts, areas, registers, and what is done with them."""
