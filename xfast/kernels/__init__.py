"""What kernels do, as data: behaviours with their commits, and the numbers of their interface."""
