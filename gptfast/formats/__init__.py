"""Models as files: GGUF, Hugging Face folders, tokenizers. Every file that is read is treated as hostile."""
