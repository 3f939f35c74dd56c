"""Mathematics and networks: pure tensor functions first, the draft network after them. No serving code."""
