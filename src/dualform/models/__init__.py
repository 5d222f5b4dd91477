"""Whole models: configs and presets, the language model, its tokenizer, and the files they are saved in."""
