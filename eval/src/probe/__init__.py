"""What is found out about one model: which methods can run on it, and what a method has to know about it."""
