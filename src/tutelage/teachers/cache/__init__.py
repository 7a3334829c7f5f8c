"""Teacher caches: targets computed once, kept on disk by token position, and read back."""
