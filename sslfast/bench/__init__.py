"""`sslfast bench`: every op and loss beside plain PyTorch, torch.compile and installed peers."""
