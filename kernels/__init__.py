"""GPU kernels of sslfast and the numbers that shape them. Imports torch and triton only."""
