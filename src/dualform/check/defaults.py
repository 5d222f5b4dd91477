"""What is checked where nothing else is asked for; the command line reads it without loading PyTorch."""

DEVICE = "cpu"
DTYPE = "float32"
LENGTH = 65  # one more than a chunk of 64
