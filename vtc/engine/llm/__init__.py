"""Where stages act at the door of the language model, in its layers and on its KV cache."""
