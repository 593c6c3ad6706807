"""Small models learn to use tools, a game and clients of chat APIs, on a CPU and on real parts."""
