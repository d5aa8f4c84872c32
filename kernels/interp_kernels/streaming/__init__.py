"""The streaming backend: attention in O(L · chunk) memory, in PyTorch alone."""
