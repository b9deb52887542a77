"""Where stages act before the language model: on the image, inside the vision tower, and behind it."""
