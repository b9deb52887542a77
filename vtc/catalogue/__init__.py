"""Which methods there are (`registry`), where each can run (`capabilities`), and both as `tables`."""
