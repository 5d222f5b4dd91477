"""Files of GGUF, the format of llama.cpp, as models and tokenizers."""
