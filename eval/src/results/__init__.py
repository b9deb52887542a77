"""Result files, what follows from them, and the ways to show them."""
