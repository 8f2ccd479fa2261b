"""What stands for a GPU and its kernels on a CPU: they compute, and refuse what the real ones refuse."""
