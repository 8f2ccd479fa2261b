"""Models compared on held-out text: bits per byte, whatever their tokenizers."""
