"""Questions about media with known answers."""
